"""What faster evaluation costs in recall: the trained demo model by all pairs, by oneDNN and by a shortlist."""
import os

from bench import Line, clock

from unimo2_paddle.checkpoints.pretrained import from_pretrained
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.models.onednn import inference_engine
from unimo2_paddle.tasks.retrieval import RetrievalDataset, RetrievalEvaluator

PICTURES = 150
WAYS = (("oneDNN fp32", "fp32", "all"), ("oneDNN bf16", "bf16", "all"), ("a shortlist of 16", "dynamic", 16))


def measure(options):
    checkpoint, data = os.path.join(options.demo, "pretrain", "best"), os.path.join(options.demo, "data")
    if not os.path.isdir(checkpoint):
        return f"no trained demo in {options.demo}; run tools/demo.sh, or name its output directory with --demo"
    model = from_pretrained(checkpoint)
    dataset = RetrievalDataset.from_karpathy(os.path.join(data, "retrieval", "dataset_shapes.json"), os.path.join(data, "retrieval", "images"),
                                             Tokenizer.from_directory(os.path.join(data, "vocab")), max_images=PICTURES, captions_per_image=1)

    def judge(precision, rerank_k):
        evaluator = RetrievalEvaluator(dataset, pair_batch=32, rerank_k=rerank_k)
        with inference_engine(model, precision):
            started = clock()
            metrics = evaluator.run(model)
        return metrics, clock() - started

    plain, seconds = judge("dynamic", "all")
    lines = []
    for name, precision, rerank_k in WAYS:
        metrics, own = judge(precision, rerank_k)
        both = {key: (metrics[key], plain[key]) for key in ("ir_r1", "ir_r5", "ir_r10", "tr_r1", "tr_r5", "tr_r10")}
        changes = ", ".join(f"{key} {a:.2f} ({b:.2f})" for key, (a, b) in both.items())
        same = all(both[key][0] == both[key][1] for key in ("ir_r1", "tr_r1"))
        lines.append(Line(f"demo test, R@1 text to image by {name}", metrics["ir_r1"], "%", plain["ir_r1"], seconds / own, seconds / own, seconds / own,
                          bar="" if precision == "bf16" else "R@1 equal", reached=None if precision == "bf16" else same,
                          note=f"{PICTURES} pictures, one caption each; the other side judges all pairs in the dynamic graph; the ratio is of one run's time. "
                               f"In percent, theirs in brackets: {changes}."))
    return lines
