"""Training runs through the command line, judged by the log they write."""
import json
import os
import subprocess
import sys

import yaml
from bench import ROOT

LAUNCH = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir"]


def train_records(directory, values, name, workers=1):
    """Run ``tools/train.py`` with one thread per worker; returns what it logged of every step.

    Args:
        directory: of temporary files; values: the run configuration without ``run.output``, as a dict; name: of the run.
    """
    path, output = os.path.join(directory, f"{name}.yaml"), os.path.join(directory, name)
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump({**values, "run": {"output": output, "log_every": 1, "progress": False, "trial_save": False, **values.get("run", {})}}, file)
    start(directory, [str(ROOT / "tools" / "train.py"), "-c", path], workers)
    with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if record["kind"] == "train"]


def start(directory, program, workers):
    """Run a Python program and its arguments, by Paddle's launcher when there are two workers."""
    command = [*([*LAUNCH, os.path.join(directory, "log")] if workers == 2 else [sys.executable]), *program]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   check=True)
