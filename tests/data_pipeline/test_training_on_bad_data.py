"""What a training run does when its data, its workers or its commands fail: one message, the right exit status, a resume that is exact."""
import glob
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

from unimo2_paddle.data import remote_shards
from unimo2_paddle.data.pretrain_batches import PretrainBatchBuilder

PAIRS = {"mixture.weights": {"pairs": 1}, "run.save_every": 1, "run.keep_last": 20, "train.steps": 4}


def weights(run):
    return {path.name: path.read_bytes() for path in sorted((Path(run) / "best").glob("*.safetensors"))}


def test_a_killed_data_worker_ends_the_run_with_its_record_and_the_resumed_run_is_exact(pretrain_config, unimo2, tmp_path, monkeypatch):
    path = pretrain_config({**PAIRS, "data.num_workers": 2})
    assert unimo2("train", "-c", path, "-o", f"run.output={tmp_path / 'straight'}").status == 0
    build = PretrainBatchBuilder._pair_batch

    def die(self, draw):
        if draw.step == 2:
            self.readers["pairs"][0].read(draw.slots[0][2])
            monkeypatch.setattr(self, "_caption", lambda record, rng: os.kill(os.getpid(), signal.SIGKILL))
        return build(self, draw)

    monkeypatch.setattr(PretrainBatchBuilder, "_pair_batch", die)
    outcome = unimo2("train", "-c", path)
    assert outcome.status == 1 and not multiprocessing.active_children()
    assert re.search(r"data worker 0 \(process \d+\) was ended by SIGKILL.*at step 2 \(pairs\), .*pairs-00000\.tar, record \S+\. Resume", outcome.err)
    assert "Traceback" not in outcome.err
    monkeypatch.setattr(PretrainBatchBuilder, "_pair_batch", build)
    assert unimo2("train", "-c", path, "--resume", "auto").status == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight") != {}


def test_remote_shards_train_the_same_model_as_local_ones(pretrain_config, demo_data, unimo2, tmp_path):
    assert unimo2("train", "-c", pretrain_config(PAIRS), "-o", f"run.output={tmp_path / 'local'}").status == 0
    remote = pretrain_config({**PAIRS, "data.pairs": [{"shards": f"pipe:cat {demo_data}/pairs/pairs-00000.tar"}], "data.num_workers": 1})
    assert len(glob.glob(f"{demo_data}/pairs/*.tar")) == 1
    refused = unimo2("train", "-c", remote, "-o", f"run.output={tmp_path / 'refused'}")
    assert refused.status == 2 and "data.allow_pipe" in refused.err and not (tmp_path / "refused").exists()
    allowed = ["-o", "data.allow_pipe=true", "-o", f"data.shard_cache={tmp_path / 'cache'}"]
    assert unimo2("train", "-c", remote, *allowed).status == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "local") != {}


def test_a_truncated_shard_and_a_failing_command_are_the_users_errors(pretrain_config, demo_data, unimo2, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_shards.time, "sleep", lambda seconds: None)
    shard = tmp_path / "cut.tar"
    shard.write_bytes((demo_data / "pairs" / "pairs-00000.tar").read_bytes()[:5000])
    outcome = unimo2("train", "-c", pretrain_config({**PAIRS, "data.pairs": [{"shards": str(shard)}]}))
    assert outcome.status == 2 and f"{shard}: truncated tar" in outcome.err
    outcome = unimo2("train", "-c", pretrain_config({**PAIRS, "data.pairs": [{"shards": "pipe:echo no credentials >&2; exit 4"}]}), "-o",
                     "data.allow_pipe=true", "-o", f"data.shard_cache={tmp_path / 'cache'}", "-o", f"run.output={tmp_path / 'other'}")
    assert outcome.status == 2 and "exit status 4: no credentials (tried 4 times)" in outcome.err


def test_bad_pictures_are_skipped_counted_and_listed_and_training_ends_well(pretrain_config, demo_data, unimo2, tmp_path):
    import io
    import tarfile

    with tarfile.open(demo_data / "pairs" / "pairs-00000.tar") as old, tarfile.open(tmp_path / "pairs.tar", "w") as new:
        for number, member in enumerate(old):
            content = old.extractfile(member).read()
            if number in (4, 5) and member.name.endswith(("jpg", "png")):
                content = content[: len(content) // 2]
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    path = pretrain_config({**PAIRS, "data.pairs": [{"shards": str(tmp_path / "pairs.tar")}], "data.max_bad_ratio": 0.2, "data.num_workers": 2})
    assert unimo2("train", "-c", path).status == 0
    entries = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert len(entries) == 1 and re.search("truncated|damaged", entries[0]["reason"]) and entries[0]["shard"] == str(tmp_path / "pairs.tar")
