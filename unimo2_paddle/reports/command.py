"""``unimo2 report`` and ``unimo2 compare``: arguments and what they print."""


def add_report_arguments(parser):
    """The arguments of ``unimo2 report``."""
    parser.add_argument("run", metavar="OUTPUT", help="output directory of a run, for example output/demo/pretrain")
    parser.add_argument("--out", metavar="HTML", help="page to write; default: report.html in the directory")


def add_compare_arguments(parser):
    """The arguments of ``unimo2 compare``."""
    parser.add_argument("runs", nargs="+", metavar="OUTPUT", help="output directories of two or more runs")
    parser.add_argument("--out", metavar="HTML", help="page to write; default: compare.html in the directory that holds all of them")


def report(args):
    """Write a run's report again; returns the text to print."""
    from unimo2_paddle.reports.page import write_run_report

    return f"report: {write_run_report(args.run, args.out)}"


def compare(args):
    """Compare runs; returns the text to print."""
    from unimo2_paddle.reports.compare import compare_runs

    return compare_runs(args.runs, args.out)
