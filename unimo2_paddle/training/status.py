"""``unimo2 status``: what a run is doing, from the files in its output directory. The run writes ``status.json``, this module reads it.

No Paddle here: looking at a run must not cost a second and memory on a busy machine.
"""
import contextlib
import json
import os
import socket
import time

from unimo2_paddle.errors import UserInputError

FILE = "status.json"
BEAT = 2.0            # seconds between heartbeats while steps go by
SILENT = 120.0        # seconds without a heartbeat after which a run on another machine counts as dead
TREND = 20            # log lines compared with as many before them
TAIL = 1 << 18        # bytes read from the end of metrics.jsonl


def process_started(pid):
    """When a process was started, in clock ticks since boot (tells it from a later one with its number); ``None`` when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


class Heartbeat:
    """Keeps ``status.json`` of a run up to date; only the first worker writes. As a context it notes how the run ended.

    Args:
        directory: the run's output directory; enabled: first worker; facts: what stays the same (task, workers, total_steps ...).
    """

    def __init__(self, directory, enabled, **facts):
        self.path, self.enabled, self._written = os.path.join(directory, FILE), enabled, 0.0
        self.facts = {"pid": os.getpid(), "process_started": process_started(os.getpid()), "host": socket.gethostname(),
                      "started": time.time(), **facts}

    def __enter__(self):
        self.tell(state="starting")
        return self

    def __exit__(self, kind, error, _):
        if kind is not None:
            self.tell(state="interrupted" if kind is KeyboardInterrupt else "failed", error=str(error)[:500])
        elif self.facts["state"] != "stopped":
            self.tell(state="finished")

    def beat(self, **facts):
        """Note ``facts``; written when the last writing is ``BEAT`` seconds ago."""
        self.facts.update(facts)
        if time.monotonic() - self._written >= BEAT:
            self.tell()

    def tell(self, **facts):
        """Note ``facts`` and write the file."""
        self.facts.update(facts)
        if not self.enabled:
            return
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk is reported where something of value is written
            with open(self.path + ".tmp", "w", encoding="utf-8") as file:
                file.write(json.dumps({**self.facts, "updated": time.time()}) + "\n")
            os.replace(self.path + ".tmp", self.path)


def read_status(directory):
    """Everything known of the run in ``directory``.

    Returns:
        dict: the facts of ``status.json``, ``alive`` (bool), ``age`` of the last heartbeat, ``checkpoint`` (name, age) or ``None``,
        ``terms``: ``{name: (mean of the last log lines, relative change or None)}``, ``bad_records``.

    Raises:
        UserInputError: there is no run.
    """
    path = os.path.join(directory, FILE)
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        facts["state"], facts["pid"], facts["host"]  # noqa: B018  the least there must be
    except FileNotFoundError:
        raise UserInputError(f"{directory} has no {FILE}; give the run.output of a run, for example output/demo/pretrain") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserInputError(f"{path} cannot be read ({error}); the run's log is {os.path.join(directory, 'train.log')}") from None
    now = time.time()
    facts["age"] = max(0.0, now - facts.get("updated", now))  # a clock that was set back must not show a future
    facts["alive"] = _alive(facts)
    facts["checkpoint"] = _newest_checkpoint(os.path.join(directory, "checkpoints"), now)
    facts["terms"] = _terms(os.path.join(directory, "metrics.jsonl"))
    facts["bad_records"] = sum(_lines(os.path.join(directory, name)) for name in os.listdir(directory) if name.startswith("bad_records."))
    return facts


def _alive(facts):
    if facts["state"] in ("finished", "stopped", "failed", "interrupted"):
        return False
    if facts["host"] != socket.gethostname():
        return facts["age"] < SILENT
    started = process_started(facts["pid"])
    if started is None and not os.path.isdir("/proc/self"):
        return facts["age"] < SILENT
    return started is not None and started == facts.get("process_started", started)


def _newest_checkpoint(directory, now):
    try:
        names = [name for name in os.listdir(directory) if name.startswith("step-") and name[5:].isdigit()]
        newest = max(names, key=lambda name: int(name[5:]))
        return newest, max(0.0, now - os.path.getmtime(os.path.join(directory, newest, "manifest.json")))
    except (OSError, ValueError):
        return None


def _terms(path):
    """Mean and trend of every loss term over the newest training records."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    values = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut at the start of the tail, or being written
        if record.get("kind") == "train":
            for name, value in record.items():
                if (name == "loss" or "/" in name) and isinstance(value, (int, float)):
                    values.setdefault(name, []).append(value)
    terms = {}
    for name, series in values.items():
        count = min(TREND, max(1, len(series) // 2))
        mean, before = sum(series[-count:]) / count, series[-2 * count:-count]
        earlier = sum(before) / len(before) if before else 0.0
        terms[name] = (mean, mean / earlier - 1 if earlier else None)
    return terms


def _lines(path):
    try:
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0


def duration(seconds):
    """Seconds as people read them: ``12 s``, ``5:03 min``, ``7:05 h``, ``3 d 4 h``."""
    seconds = int(max(0, seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    if seconds < 86400:
        return f"{seconds // 3600}:{seconds // 60 % 60:02d} h"
    return f"{seconds // 86400} d {seconds // 3600 % 24} h"


def format_status(directory, facts):
    """The facts of :func:`read_status` as a table for the screen."""
    state = facts["state"]
    if facts["alive"]:
        life = f"alive, last heartbeat {duration(facts['age'])} ago"
    elif state in ("finished", "stopped", "failed", "interrupted"):
        life = f"ended {duration(facts['age'])} ago"
    else:
        life = f"DEAD: gone without a word {duration(facts['age'])} ago; resume with --resume auto"
    rows = [("run", f"{directory} ({facts.get('task', '?')})"), ("state", f"{state}; {life}"),
            ("process", f"{facts['pid']} on {facts['host']}, {facts.get('workers', 1)} worker(s), running for "
                        f"{duration(facts.get('updated', 0) - facts.get('started', 0))}")]
    step, total = facts.get("step", 0), facts.get("total_steps", 0)
    rows.append(("step", f"{step} of {total} ({100 * step / max(1, total):.1f} %), epoch {facts.get('epoch', 0):.2f}"))
    if "ips" in facts:
        rows.append(("speed", f"{facts['ips']:.2f} samples/s, {facts['batch_cost']:.3f} s a step of which {facts['reader_cost']:.3f} s reading"))
    if facts["alive"] and "eta" in facts:
        rows.append(("eta", duration(facts["eta"] - facts["age"])))
    for name, (mean, change) in sorted(facts["terms"].items(), key=lambda item: (item[0] != "loss", item[0])):
        rows.append((name, f"{mean:.4f}" + ("" if change is None else f"  ({100 * change:+.1f} %)")))
    best = facts.get("best")
    rows.append(("best", f"{best['metric']} {best['value']:.2f} at step {best['step']}" if best else "nothing judged yet"))
    checkpoint = facts["checkpoint"]
    rows.append(("checkpoint", f"{checkpoint[0]}, {duration(checkpoint[1])} old" if checkpoint else "none yet"))
    rows.append(("bad", f"{facts.get('bad_steps', 0)} step(s) skipped, {facts['bad_records']} record(s) left out"))
    if facts.get("error"):
        rows.append(("error", facts["error"]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def show_status(directory, watch=0.0):
    """``unimo2 status``: print the table once, or again and again every ``watch`` seconds until the run ends or Ctrl-C."""
    facts = read_status(directory)
    print(format_status(directory, facts), flush=True)
    while watch and facts["alive"]:
        time.sleep(watch)
        facts = read_status(directory)
        print("\n" + time.strftime("%H:%M:%S") + "\n" + format_status(directory, facts), flush=True)
