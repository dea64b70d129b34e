"""Two gloo workers against one worker that does the whole batch: pre-training steps through the launcher, from the runs' own logs."""
import json
import os
import statistics
import subprocess
import sys
import tempfile

import yaml
from bench import ROOT, Line

from unimo2_paddle.data.demo import write_demo_data

STEPS, WARM = {"tiny": 16, "base": 6}, {"tiny": 6, "base": 2}
MODELS = {"tiny": {"config": "unimo2_demo"}, "base": {"config": "unimo2_demo", "hidden_size": 384, "text_hidden_size": 384, "vit_hidden_size": 384,
                                                      "num_attention_heads": 6, "text_num_attention_heads": 6, "vit_num_attention_heads": 6}}


def run(directory, workers, size, name):
    """Seconds of the steps after the first few, by a launch of so many workers with one thread each."""
    data, output = os.path.join(directory, "data"), os.path.join(directory, name)
    values = {
        "task": "pretrain", "model": MODELS[size],
        "data": {"vocab": f"{data}/vocab", "max_text_len": 40, "pairs": [{"shards": f"{data}/pairs/*.tar"}]},
        "mixture": {"weights": {"pairs": 1.0}, "global_batch": {"pairs": 64}}, "train": {"steps": STEPS[size], "matching_group": 16}, "optim": {},
        "run": {"output": output, "log_every": 1, "progress": False, "trial_save": False},
    }
    path = os.path.join(directory, f"{name}.yaml")
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file)
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", os.path.join(directory, "log")]
    command = [*(launch if workers == 2 else [sys.executable]), str(ROOT / "tools" / "train.py"), "-c", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    with open(os.path.join(output, "metrics.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record["batch_cost"] for record in records if record["kind"] == "train"][WARM[size]:]


def measure(options):
    with tempfile.TemporaryDirectory() as directory:
        write_demo_data(os.path.join(directory, "data"), size=128, seed=1)
        one, two = [], []
        for turn in range(max(1, options.repeats - 1)):
            one.append(statistics.median(run(directory, 1, options.size, f"one{turn}")))
            two.append(statistics.median(run(directory, 2, options.size, f"two{turn}")))
    ratios = [a / b for a, b in zip(one, two)]
    ratio = statistics.median(ratios)
    idle = os.getloadavg()[0] < 2.5
    return [Line("pre-training step, two gloo workers against one with the whole batch", 1e3 * statistics.median(two), "ms",
                 1e3 * statistics.median(one), ratio, min(ratios), max(ratios), bar=">= 1.6x where two cores are free",
                 reached=ratio >= 1.6 if idle or ratio >= 1.6 else None,
                 note="Wall time of a step of 64 pairs, one thread per worker, from the runs' logs." + ("" if idle else
                      " Not judged: other processes wanted the cores while this ran."))]
