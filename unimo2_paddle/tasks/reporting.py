"""Reports people look at: predictions as JSON lines and one HTML page with pictures, right and wrong examples."""
import base64
import html
import json
import os

THUMBNAIL = 160
STYLE = ("body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
          "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .7rem;text-align:left;vertical-align:top}"
          "th{background:#f4f4f4}.right{border-left:.4rem solid #2a9d4a}.wrong{border-left:.4rem solid #d1432f}"
          ".card{display:flex;gap:1rem;margin:.7rem 0;padding:.5rem .8rem;background:#fafafa}.card img{max-width:10rem;align-self:flex-start}")


_EXAMPLES = "<!-- examples -->"  # what follows it on a page are examples alone


def write_json(path, values, sort_keys=True):
    """Write a mapping as an indented JSON file, all or nothing."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def write_predictions(path, rows):
    """Write one JSON object per line, all or nothing.

    Args:
        path: target file; rows: iterable of plain mappings (inputs, outputs, scores).
    """
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path, text):
    """Write a text file, all or nothing."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def thumbnail(image_path):
    """A picture as an ``<img>`` element with the data inside the page; an unreadable one as a note."""
    from unimo2_paddle.data.images import decode_image
    from unimo2_paddle.errors import ImageError

    try:
        data = jpeg_bytes(decode_image(image_path), THUMBNAIL)
    except ImageError as error:
        return f"<em>{html.escape(str(error))}</em>"
    return f'<img alt="{html.escape(os.path.basename(str(image_path)))}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'


def jpeg_bytes(image, edge=0):
    """A uint8 RGB array ``[H, W, 3]`` as a JPEG file whose longer side is at most ``edge`` pixels (0: as it is)."""
    import cv2

    scale = edge / max(image.shape[:2])
    if 0 < scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image[:, :, ::-1])[1].tobytes()


def write_html_report(path, title, metrics, examples, notes=(), tables=()):
    """Write a self-contained page.

    Args:
        title: headline; metrics: ``{name: float}``.
        examples: mappings with ``correct`` (bool), optional ``image`` (path), and other fields shown as text.
        notes: sentences under the headline; tables: (caption, header list, rows) triples, for example a confusion matrix.
    """
    parts = [page_start(title)]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    parts.append(table("Metrics", ["metric", "value"], [[name, f"{value:.4f}"] for name, value in metrics.items()]))
    parts += [table(*one) for one in tables]
    parts.append(_EXAMPLES)
    for heading, wanted in (("Wrong", False), ("Right", True)):
        chosen = [example for example in examples if bool(example["correct"]) == wanted]
        parts.append(f"<h2>{heading} ({len(chosen)} shown)</h2>")
        parts += [_card(example) for example in chosen]
    write_text(path, "\n".join(parts) + "\n")


def page_start(title, style=STYLE):
    """The first lines of a self-contained page."""
    return ("<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            f"<title>{html.escape(title)}</title><style>{style}</style><h1>{html.escape(title)}</h1>")


def examples_of(path):
    """The right and wrong examples of a page that :func:`write_html_report` wrote, for another page; "" when it has none."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().partition(_EXAMPLES)[2].replace("<h2>", "<h3>").replace("</h2>", "</h3>")


def table(caption, header, rows):
    """A captioned ``<table>``; every cell is shown as text. Without a header (all cells empty) there are rows only."""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header) if any(header) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{html.escape(caption)}</h2><table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def _card(example):
    # there may be region features of a picture and no file
    picture = thumbnail(example["image"]) if example.get("image") and os.path.exists(example["image"]) else ""
    fields = "".join(f"<div><b>{html.escape(str(key))}</b> {html.escape(str(value))}</div>"
                     for key, value in example.items() if key not in ("image", "correct"))
    return f"<div class='card {'right' if example['correct'] else 'wrong'}'>{picture}<div>{fields}</div></div>"


def right_and_wrong(rows, most=12):
    """Up to ``most`` wrong and ``most`` right rows (mappings with ``correct``), in order."""
    return [r for r in rows if not r["correct"]][:most] + [r for r in rows if r["correct"]][:most]
