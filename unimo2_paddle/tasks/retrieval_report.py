"""What a retrieval evaluation leaves behind: numbers, every query's best answers, and a sheet of pictures to look at."""
import json
import os
import textwrap

import numpy as np

from unimo2_paddle.data.images import decode_image
from unimo2_paddle.metrics.retrieval import retrieval_ranks
from unimo2_paddle.tasks.reporting import right_and_wrong, write_html_report

LISTED = 10          # answers per query in retrieval.jsonl
SHOWN = 5            # answers per query on the sheet
TEXT_QUERIES, IMAGE_QUERIES = 8, 4
RIGHT, WRONG = "#1a9641", "#bbbbbb"
_PICTURE_EDGE = 240  # pixels; larger pictures are thinned out before they are drawn


def write_retrieval_report(evaluator, directory):
    """Write the report of an evaluator that has run.

    Args:
        evaluator: a ``RetrievalEvaluator``; directory: made when it does not exist.

    Returns:
        dict of paths: ``results`` (metrics and sizes, JSON), ``queries`` (per query: best answers with scores, rank of the
        right one; JSON lines), ``sheet`` (PNG), ``page`` (HTML with right and wrong answers).
    """
    os.makedirs(directory, exist_ok=True)
    paths = {key: os.path.join(directory, name) for key, name in
             (("results", "results.json"), ("queries", "retrieval.jsonl"), ("sheet", "retrieval.png"), ("page", "retrieval.html"))}
    ranks = retrieval_ranks(evaluator.scores.retrieval, evaluator.dataset.text_image)
    _replace(paths["results"], lambda path: _write_results(evaluator, path))
    _replace(paths["queries"], lambda path: _write_queries(evaluator, ranks, path))
    _replace(paths["sheet"], lambda path: _draw_sheet(evaluator, ranks, path))
    _write_page(evaluator, ranks, paths["page"])
    return paths


def _replace(path, write):
    """Let ``write`` fill a temporary file and move it into place, so that a reader never sees half a file."""
    root, ending = os.path.splitext(path)
    temporary = f"{root}.tmp{os.getpid()}{ending}"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _write_results(evaluator, path):
    dataset = evaluator.dataset
    content = {
        "name": evaluator.name, "images": len(dataset), "captions": len(dataset.captions),
        "score": "matching score" if evaluator.score_weight is None else f"matching logit + {evaluator.score_weight:g} x contrastive score",
        "rerank_k": evaluator.rerank_k,
        "metrics": evaluator.metrics, "chance": evaluator.chance(),
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def _best(scores, count):
    """Indices of the ``count`` largest of ``scores`` [N], best first; equal scores in order of their index."""
    count = min(count, len(scores))
    # everything as good as the last one that fits, so that ties at the border are decided by the index and not by the partition
    border = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= border)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]


def _write_queries(evaluator, ranks, path):
    dataset, scores = evaluator.dataset, evaluator.scores.retrieval
    with open(path, "w", encoding="utf-8") as file:
        for text, image in enumerate(dataset.text_image.tolist()):
            top = [{"image": dataset.image_ids[i], "score": _rounded(scores[text, i])} for i in _best(scores[text], LISTED)]
            line = {"direction": "text_to_image", "query": dataset.captions[text], "caption": text,
                    "right": dataset.image_ids[image], "rank": int(ranks[0][text]), "top": top}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for image, name in enumerate(dataset.image_ids):
            column = np.ascontiguousarray(scores[:, image])
            top = [{"caption": int(t), "text": dataset.captions[t], "score": _rounded(column[t])}
                   for t in _best(column, LISTED)]
            line = {"direction": "image_to_text", "query": name, "right": np.flatnonzero(dataset.text_image == image).tolist(),
                    "rank": int(ranks[1][image]), "top": top}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_page(evaluator, ranks, path):
    """Captions with the picture they found; the first wrong and right ones."""
    dataset, scores = evaluator.dataset, evaluator.scores.retrieval
    rows = []
    for text, right in enumerate(dataset.text_image.tolist()):
        found = int(_best(scores[text], 1)[0])
        rows.append({"correct": ranks[0][text] == 1, "image": dataset.image_paths[found], "caption": dataset.captions[text],
                     "found": f"{dataset.image_ids[found]} (score {scores[text, found]:.3f})",
                     "right": f"{dataset.image_ids[right]} (score {scores[text, right]:.3f}, rank {ranks[0][text]} of {len(dataset)})",
                     "captions of the picture found": " / ".join(dataset.captions[t] for t in np.flatnonzero(dataset.text_image == found)[:2])})
    write_html_report(path, f"Retrieval, {evaluator.name}", evaluator.metrics, right_and_wrong(rows), notes=[
        f"{len(dataset)} pictures, {len(dataset.captions)} captions. Each card is a caption with the picture that it found."])


def _rounded(score):
    return round(float(score), 6)


def _spread(count, total):
    """``count`` numbers spread evenly over ``range(total)``: a fair choice that does not depend on the results."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def _draw_sheet(evaluator, ranks, path):
    from matplotlib.figure import Figure  # not pyplot: no display, no state shared with the caller

    dataset, scores = evaluator.dataset, evaluator.scores.retrieval
    texts, images = _spread(TEXT_QUERIES, len(dataset.captions)), _spread(IMAGE_QUERIES, len(dataset))
    rows = len(texts) + len(images)
    figure = Figure(figsize=(12.5, 0.9 + 1.75 * rows), facecolor="white")
    grid = figure.add_gridspec(rows, 2 + SHOWN, left=0.02, right=0.98, top=1 - 0.8 / figure.get_figheight(), bottom=0.01,
                               hspace=0.25, wspace=0.08)
    figure.suptitle(f"Retrieval on {evaluator.name}: {len(dataset)} pictures, {len(dataset.captions)} captions. "
                    f"R@1: text to picture {evaluator.metrics['ir_r1']:.1f} %, "
                    f"picture to text {evaluator.metrics['tr_r1']:.1f} %.\n"
                    "Green: the right answer. Queries are spread evenly over the data, not chosen by result.",
                    fontsize=11, y=1 - 0.15 / figure.get_figheight(), va="top")
    for row, text in enumerate(texts):
        _write_cell(figure.add_subplot(grid[row, :2]), [(dataset.captions[text], "black")],
                    note=f"right picture at rank {ranks[0][text]} of {len(dataset)}")
        for column, image in enumerate(_best(scores[text], SHOWN)):
            axes = figure.add_subplot(grid[row, 2 + column])
            _draw_picture(axes, dataset, image, RIGHT if image == dataset.text_image[text] else None)
            axes.set_title(f"{scores[text, image]:.2f}", fontsize=8, pad=2, color="#555555")
    for row, image in enumerate(images, len(texts)):
        axes = figure.add_subplot(grid[row, :2])
        axes.set_anchor("W")
        _draw_picture(axes, dataset, image, None)
        column = np.ascontiguousarray(scores[:, image])
        lines = [(f"{column[t]:.2f}   {dataset.captions[t]}", RIGHT if dataset.text_image[t] == image else "black")
                 for t in _best(column, SHOWN)]
        _write_cell(figure.add_subplot(grid[row, 2:]), lines, width=105,
                    note=f"best right caption at rank {ranks[1][image]} of {len(dataset.captions)}")
    figure.savefig(path, dpi=80)


def _write_cell(axes, lines, width=36, note=""):
    """Lines of (text, colour) from top to bottom, then a grey note; ``parse_math`` is off because captions may hold a $."""
    axes.set_axis_off()
    per_line = 2 if len(lines) > 1 else 6
    place, step = 0.97, 0.135
    for text, colour in lines:
        wrapped = textwrap.wrap(text, width, max_lines=per_line if len(lines) == 1 else 1, placeholder=" ...") or [""]
        axes.text(0.0, place, "\n".join(wrapped), fontsize=9.5, color=colour, va="top", parse_math=False,
                  transform=axes.transAxes, fontweight="bold" if colour == RIGHT else "normal")
        place -= step * len(wrapped) + 0.02
    axes.text(0.0, place - 0.03, note, fontsize=8.5, color="#777777", va="top", transform=axes.transAxes)


def _draw_picture(axes, dataset, number, frame):
    if dataset.regions is not None and not os.path.isfile(dataset.image_paths[number]):
        axes.text(0.5, 0.5, dataset.image_ids[number], fontsize=9, ha="center", va="center", parse_math=False, transform=axes.transAxes)
    else:
        picture = decode_image(dataset.image_paths[number], exif=dataset.exif)
        thin = max(1, max(picture.shape[:2]) // _PICTURE_EDGE)
        axes.imshow(picture[::thin, ::thin])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame or WRONG)
        spine.set_linewidth(4 if frame else 0.5)
