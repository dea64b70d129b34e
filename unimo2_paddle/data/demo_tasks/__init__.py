"""Demo data of the finetuning tasks, derived from the coloured-shape corpora and written in each task's real formats."""
import importlib
import json
import os
import shutil

TASKS = ("captioning", "classes", "entailment", "glue", "regions", "rewrites", "seq2seq", "vqa")


def write_demo_tasks(out):
    """Write what is missing of ``OUT/<task>`` into a demo directory; each folder appears only when it is complete.

    Args:
        out: a directory written by ``write_demo_data``.

    Returns:
        one line per task for the screen.
    """
    with open(os.path.join(out, "demo.json"), encoding="utf-8") as file:
        seed = json.load(file)["seed"]
    lines = []
    for name in TASKS:
        target = os.path.join(out, name)
        if os.path.isdir(target):
            lines.append(f"  {name}: there already")
            continue
        temporary = target + ".tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        line = importlib.import_module(f"unimo2_paddle.data.demo_tasks.{name}").write(temporary, out, seed)
        os.rename(temporary, target)
        lines.append("  " + line.strip().replace(temporary, target))
    return "\n".join(lines)
