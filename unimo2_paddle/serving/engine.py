"""Running the programs of an exported model: by paddle.inference, or by onnxruntime."""
import hashlib
import json
import os
import threading

from unimo2_paddle.errors import CheckpointError, UserInputError

EXPORT_FILE = "export.json"
FORMAT = 1
ENGINES = ("paddle", "onnx")


def is_exported(directory):
    """Whether a directory is what ``unimo2 export`` writes."""
    return os.path.isfile(os.path.join(directory, EXPORT_FILE))


def read_export_file(directory):
    """What ``export.json`` tells about an exported model.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    path = os.path.join(directory, EXPORT_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            about = json.load(file)
        version, programs = about["format"], about["programs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); export the model again with unimo2 export") from None
    if version != FORMAT or not isinstance(programs, dict):
        raise CheckpointError(f"{path}: format {version!r}, this version reads {FORMAT}; export the model again with unimo2 export")
    return about


def check_files(directory, about):
    """Compare every file with its checksum in ``export.json``.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    for name, wanted in about["files"].items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is missing; export the model again with unimo2 export")
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        if digest.hexdigest() != wanted:
            raise CheckpointError(f"{path} is damaged (its sha256 is not the one in {EXPORT_FILE}); copy it again, or export the model again")


class ExportedPrograms:
    """The programs of an exported model, each loaded when it is first run; safe to use from several threads, one of which computes.

    Args:
        directory: what ``unimo2 export`` wrote; engine: "paddle" (paddle.inference) or "onnx" (onnxruntime).
        threads: of the computation; 0: as ``OMP_NUM_THREADS`` says.

    Raises:
        CheckpointError: the directory is incomplete or damaged.
        UserInputError: an unknown engine, onnxruntime is not installed, or the model was exported without ONNX.
    """

    def __init__(self, directory, engine="paddle", threads=0):
        self.directory, self.engine, self.about = directory, engine, read_export_file(directory)
        self.threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 1)
        check_files(directory, self.about)
        if engine not in ENGINES:
            raise UserInputError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
        if engine == "onnx" and not all("onnx" in program for program in self.about["programs"].values()):
            raise UserInputError(f"{directory}: was exported without ONNX; export it again with --onnx, or use the engine paddle")
        self.open = {"paddle": _PaddleProgram, "onnx": _OnnxProgram}[engine]
        if engine == "onnx":
            import_onnxruntime()
        self.programs, self.lock = {}, threading.Lock()

    def run(self, name, batch):
        """Outputs of a program by name, numpy arrays; ``batch``: numpy arrays with at least the program's inputs."""
        about = self.about["programs"][name]
        with self.lock:
            if name not in self.programs:
                self.programs[name] = self.open(self.directory, about, self.threads)
            found = self.programs[name].run({spec["name"]: batch[spec["name"]] for spec in about["inputs"]})
        return dict(zip(about["outputs"], found))


def import_onnxruntime():
    """The module.

    Raises:
        UserInputError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserInputError("onnxruntime is not installed; pip install 'unimo2_paddle[onnx]', or use the engine paddle") from None
    return onnxruntime


class _PaddleProgram:
    """One program in paddle.inference.

    oneDNN stays off: in Paddle 3.3.1 it is on by default and fails on the patch embedding (NHWC padding with another layout's shape, or a crash).
    """

    def __init__(self, directory, about, threads):
        from paddle import inference

        config = inference.Config(*(os.path.join(directory, name) for name in about["paddle"]))
        config.disable_gpu()
        config.disable_glog_info()
        if hasattr(config, "disable_onednn"):
            config.disable_onednn()
        elif hasattr(config, "disable_mkldnn"):
            config.disable_mkldnn()
        config.set_cpu_math_library_num_threads(threads)
        self.predictor = inference.create_predictor(config)
        self.inputs = {name: self.predictor.get_input_handle(name) for name in self.predictor.get_input_names()}
        self.outputs = [self.predictor.get_output_handle(name) for name in self.predictor.get_output_names()]

    def run(self, batch):
        for name, handle in self.inputs.items():  # an input that a program does not use is not in it
            handle.copy_from_cpu(batch[name])
        self.predictor.run()
        return [handle.copy_to_cpu() for handle in self.outputs]


class _OnnxProgram:
    """One program in onnxruntime."""

    def __init__(self, directory, about, threads):
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(os.path.join(directory, about["onnx"]), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]

    def run(self, batch):
        return self.session.run(None, {name: batch[name] for name in self.inputs})
