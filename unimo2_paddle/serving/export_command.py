"""``unimo2 export``: a checkpoint directory as programs for paddle.inference and ONNX, and the comparison of both."""
from unimo2_paddle.errors import UserInputError


def add_arguments(parser):
    """The command's arguments."""
    parser.add_argument("-m", "--model", required=True, metavar="DIR", help="best/ of a finetuning run, or a pre-trained model; also zoo:NAME")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--to", metavar="DIR", help="directory to write (must not exist)")
    place.add_argument("--check", metavar="DIR", help="compare an exported model with --model again, and write nothing")
    parser.add_argument("--onnx", action="store_true", help="write ONNX too (pip install 'unimo2_paddle[onnx]')")
    parser.add_argument("--tolerance", type=float, default=1e-5, metavar="X",
                        help="largest difference from the model, of an output's largest value; default: 1e-5")


def run(args):
    """Export or check; returns the comparison as text for the screen."""
    if args.tolerance <= 0:
        raise UserInputError(f"--tolerance must be above 0, is {args.tolerance:g}")
    if args.check and args.onnx:
        raise UserInputError("--onnx goes with --to; --check compares what there is")
    from unimo2_paddle.serving.export import check, export
    from unimo2_paddle.serving.parity import table
    from unimo2_paddle.serving.predictor import Predictor

    predictor = Predictor(args.model)
    if args.check:
        return table(check(predictor, args.check, args.tolerance))
    return f"{table(export(predictor, args.to, args.onnx, args.tolerance))}\n\nwrote {args.to}"
