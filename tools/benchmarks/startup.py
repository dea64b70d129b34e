"""What typing a command costs before it does anything."""
import statistics
import subprocess
import sys
import time

from bench import Line, alternate

STARTS = {
    "unimo2 --help": [sys.executable, "-m", "unimo2_paddle.cli", "--help"],
    "import unimo2_paddle": [sys.executable, "-c", "import unimo2_paddle"],
    "python": [sys.executable, "-c", "pass"],
}
HEAVY = ("paddle", "paddlenlp", "paddleclas", "visualdl", "matplotlib", "sklearn", "cv2")


def loaded(statement):
    """Which heavy packages are loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def measure(options):
    times = alternate({name: lambda command=command: subprocess.run(command, stdout=subprocess.DEVNULL, check=True) for name, command in STARTS.items()},
                      max(5, options.repeats), clock=time.perf_counter)
    bare = statistics.median(times["python"])
    help_seconds, heavy = statistics.median(times["unimo2 --help"]), loaded("import unimo2_paddle")
    return [
        Line("start-up: `unimo2 --help`", help_seconds, "s", bar="<= 0.5 s", reached=help_seconds <= 0.5, floor=f"Python alone: {bare:.3f} s."),
        Line("start-up: `import unimo2_paddle`", statistics.median(times["import unimo2_paddle"]), "s", bar="loads no heavy package", reached=not heavy,
             note=f"Loaded with it: {', '.join(heavy) or 'none'} of {', '.join(HEAVY)}."),
    ]
