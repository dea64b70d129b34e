"""An explanation to look at: ``explain.png``, and ``explain.html`` with everything inside it."""
import base64
import html
import os
import textwrap

import numpy as np

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.serving.explain import BOTH, IMAGE, NEITHER, TEXT
from unimo2_paddle.tasks.reporting import jpeg_bytes, thumbnail, write_json, write_text

ORIGINS = {BOTH: "shared by picture and sentence", IMAGE: "from the picture", TEXT: "from the sentence", NEITHER: "hardly anyone's"}
_STYLE = ("body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
          "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}"
          "section{display:flex;flex-wrap:wrap;gap:1.2rem;margin:1.2rem 0;padding:.8rem 1rem;background:#fafafa;border-left:.4rem solid #8aa}"
          "section.both{border-color:#1a7a3c}section>div{flex:1 1 18rem}h2{margin:.1rem 0 .4rem;font-size:1.1rem}"
          ".map{display:grid;width:12rem;height:12rem;flex:none;background-size:100% 100%;position:relative}"
          ".map i{opacity:.62}.picture{width:12rem;height:12rem;image-rendering:pixelated}"
          ".words span{display:inline-block;padding:.05rem .35rem;margin:.1rem;border-radius:.2rem}"
          ".near img{height:4.5rem;margin:.2rem}small{color:#666}")


def write_explanation(explanation, directory, title="Grounded tokens"):
    """Write ``explain.json``, ``explain.png`` and ``explain.html``; returns ``{name: path}``.

    Raises:
        UserInputError: the directory cannot be written.
    """
    paths = {kind: os.path.join(directory, f"explain.{kind}") for kind in ("json", "png", "html")}
    try:
        os.makedirs(directory, exist_ok=True)
        write_json(paths["json"], explanation.to_json())
        draw_explanation(explanation, paths["png"])
        write_text(paths["html"], render_explanation(explanation, title))
    except OSError as error:
        raise UserInputError(f"{directory}: the explanation cannot be written: {error.strerror}") from None
    return paths


def summary(explanation):
    """What was found, as sentences."""
    told = [f"the {name} alone would choose {len(ids)}, {len(set(ids) & set(explanation.chosen))} of them among these"
            for name, ids in (("picture", explanation.image_ids), ("sentence", explanation.text_ids)) if ids]
    lines = [f"{len(explanation.chosen)} grounded tokens of {explanation.codes} codes{': ' * bool(told)}{'; '.join(told)}."]
    if explanation.picture is not None and explanation.caption:
        lines.append(f"Shared by both: {len(explanation.shared)} ({', '.join(map(str, explanation.shared[:20])) or 'none'}).")
    if explanation.match is not None:
        lines.append(f"Score of the pair: {explanation.match:.3f}.")
    for token in explanation.tokens:
        if token.image_share is not None and token.image_share > 0.99 or token.text_share is not None and token.text_share > 0.99:
            lines.append("Where a share is 1, every position of that side has the largest relevance: the code says nothing about where, "
                         "and the colours show the similarity before the sigmoid.")
            break
    return lines


def scaled(values):
    """Values between 0 (least) and 1 (most); all 0 where they are the same everywhere."""
    array = np.asarray(values, np.float64)
    spread = array.max() - array.min()
    return (array - array.min()) / spread if spread > 1e-9 else np.zeros_like(array)


def heading(token):
    """A token's number, rank and origin."""
    return f"token {token.id} (rank {token.rank}, {ORIGINS[token.origin]})"


def _shares(token):
    told = [f"{name} {share:.3f}" for name, share in (("patches", token.image_share), ("words", token.text_share)) if share is not None]
    return f"mean relevance: {', '.join(told)}"


def _colours(values):
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["inferno"](scaled(values).ravel())]


def render_explanation(explanation, title="Grounded tokens"):
    """The page as a text; it needs no other file."""
    parts = [f"<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(title)}</title>"
             f"<style>{_STYLE}{_picture_rule(explanation)}</style><h1>{html.escape(title)}</h1>"]
    if explanation.picture is not None:
        data = base64.b64encode(jpeg_bytes(explanation.picture)).decode()
        parts.append(f"<img class='picture' alt='the picture as the model sees it' src='data:image/jpeg;base64,{data}'>")
    if explanation.caption:
        parts.append(f"<p><b>{html.escape(explanation.caption)}</b></p>")
    parts += [f"<p>{html.escape(line)}</p>" for line in summary(explanation)]
    parts.append("<p><small>Colours from dark (least similar) to light (most similar), scaled for every token and side apart; "
                 "similarity is the product of a patch's or word's state with the code.</small></p>")
    parts += [_section(explanation, token) for token in explanation.tokens]
    rows = "".join(f"<tr><td>{rank}</td><td>{code}</td><td>{'yes' if code in explanation.image_ids else ''}</td>"
                   f"<td>{'yes' if code in explanation.text_ids else ''}</td></tr>" for rank, code in enumerate(explanation.chosen, 1))
    parts.append(f"<h2>All chosen tokens</h2><table><tr><th>rank</th><th>token</th><th>picture alone</th><th>sentence alone</th></tr>{rows}</table>")
    return "\n".join(parts) + "\n"


def _picture_rule(explanation):
    if explanation.picture is None:
        return ""
    grey = np.repeat(explanation.picture.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    return f".map{{background-image:url(data:image/jpeg;base64,{base64.b64encode(jpeg_bytes(grey)).decode()})}}"


def _section(explanation, token):
    parts = [f"<section class='{token.origin}'>"]
    if token.patches:
        cells = "".join(f"<i style='background:{colour}'></i>" for colour in _colours(token.patches))
        parts.append(f"<div class='map' role='img' aria-label='heat map of token {token.id} over the patches' "
                     f"style='grid-template-columns:repeat({len(token.patches)},1fr)'>{cells}</div>")
    parts.append(f"<div><h2>{html.escape(heading(token))}</h2><p><small>{html.escape(_shares(token))}</small></p>")
    if token.words:
        words = zip(explanation.words, token.words, _colours(token.words), scaled(token.words))
        parts.append("<p class='words'>" + " ".join(
            f"<span style='background:{colour};color:{'#000' if level > 0.6 else '#fff'}' title='{value:.4f}'>{html.escape(word)}</span>"
            for word, value, colour, level in words) + "</p>")
    if token.near_words:
        near = ", ".join(f"{html.escape(entry['word'])} <small>{entry['share']:.3f}</small>" for entry in token.near_words)
        parts.append(f"<p>nearest words: {near}</p>")
    if token.pictures:
        parts.append("<p class='near'>nearest pictures:<br>" + "".join(
            f"<span title='{html.escape(os.path.basename(entry['item']))} {entry['share']:.3f}'>{thumbnail(entry['item'])}</span>"
            for entry in token.pictures) + "</p>")
    return "".join(parts) + "</div></section>"


def draw_explanation(explanation, path):
    """One row per token: heat map over the picture, and bars for the words; the picture and what was found above them."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state shared with the caller

    rows, widths = len(explanation.tokens), [1] * (explanation.picture is not None) + [2] * bool(explanation.words)
    figure = Figure(figsize=(3.4 * sum(widths), 2.9 + 2.4 * rows), facecolor="white")
    height = figure.get_figheight()
    grid = figure.add_gridspec(rows + 1, len(widths), width_ratios=widths, left=0.05, right=0.98, bottom=0.7 / height, top=1 - 0.2 / height,
                               hspace=0.6, wspace=0.15)
    if explanation.picture is not None:
        axes = figure.add_subplot(grid[0, 0])
        axes.imshow(explanation.picture)
        axes.set_axis_off()
    if explanation.words:
        axes = figure.add_subplot(grid[0, -1])
        axes.set_axis_off()
        lines = [line for told in [explanation.caption, "", *summary(explanation)[:3]] for line in textwrap.wrap(told, 88) or [""]]
        axes.text(0, 1, "\n".join(lines), va="top", fontsize=8.5, parse_math=False, transform=axes.transAxes)
    for row, token in enumerate(explanation.tokens, 1):
        title = f"{heading(token)}\n{_shares(token)}"
        if token.patches:
            axes = figure.add_subplot(grid[row, 0])
            _draw_patches(axes, explanation.picture, token)
        if token.words:
            axes = figure.add_subplot(grid[row, -1])
            _draw_words(axes, explanation.words, token)
        axes.set_title(title, fontsize=8, loc="left")
    temporary = f"{path}.tmp.png"
    figure.savefig(temporary, dpi=90)
    os.replace(temporary, path)


def _draw_patches(axes, picture, token):
    size = picture.shape[0]
    axes.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    axes.imshow(scaled(token.patches), cmap="inferno", alpha=0.62, vmin=0, vmax=1, extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest")
    axes.set_axis_off()


def _draw_words(axes, words, token):
    places = np.arange(len(words))
    axes.bar(places, token.words, color=_colours(token.words), edgecolor="#555555", linewidth=0.4)
    axes.set_xticks(places)
    axes.set_xticklabels(words, rotation=60, ha="right", fontsize=7, parse_math=False)
    axes.set_ylabel("similarity", fontsize=7)
    axes.tick_params(axis="y", labelsize=6.5)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
