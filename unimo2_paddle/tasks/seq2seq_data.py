"""Text generation data: sources, dialogues and targets of UNIMO's files as samples and batches (reference notes, unimo1.md section 3.2)."""
import logging
from dataclasses import dataclass
from typing import List

import numpy as np

from unimo2_paddle.data.collate import FIRST_POSITION, PAD_POSITION, flat_positions, pad, seq2seq_visibility
from unimo2_paddle.data.formats.seq2seq import SEPARATOR, SEQ2SEQ, Seq2SeqFile, read_references, seq2seq_file
from unimo2_paddle.data.tokenizer import vocabulary_keys
from unimo2_paddle.errors import DataError

logger = logging.getLogger(__name__)

KNOWLEDGE_ROLE = 2  # the speakers have 0 and 1
PAD_ROLE = 1        # padded places have it, as the authors pad everything with 1
MOST_TURNS = 15     # of a dialogue that are read: turn 0 is the answer (the authors' 16 turn embeddings)


@dataclass
class Seq2SeqData:
    """Group ``data``.

    ``dataset``: cnndm, gigaword, squad_qg or coqa; says the files' names, the metrics and whether sources are dialogues. ``directory``:
    its folder. ``vocab``: folder of the three vocabulary files. ``tokenized``: cells hold vocabulary keys, as the authors' do; false:
    plain text. ``max_source_len``: tokens of a source or of a turn with [CLS] and [SEP]; ``max_target_len``: with [CLS] and end token;
    a longer target loses both its end and its end token. ``references``: JSON lines to judge by instead of the column tgt, ``{split}``
    stands for the split. ``max_bad_ratio``: share of bad training records that are left out and counted (judged splits have to be whole).
    """

    dataset: str
    directory: str
    vocab: str
    tokenized: bool = True
    max_source_len: int = 512
    max_target_len: int = 128
    references: str = ""
    max_bad_ratio: float = 0.001
    num_workers: int = 0

    def problems(self):
        found = [f"{key}: is empty; give a path" for key in ("directory", "vocab") if not getattr(self, key)]
        found += [f"{key}: must be at least {low}, is {getattr(self, key)}"
                  for key, low in (("max_source_len", 3), ("max_target_len", 3), ("num_workers", 0)) if getattr(self, key) < low]
        if self.dataset not in SEQ2SEQ:
            found.append(f"dataset: {self.dataset!r} is not one of {', '.join(SEQ2SEQ)}")
        if not 0 <= self.max_bad_ratio < 1:
            found.append(f"max_bad_ratio: must be in [0, 1), is {self.max_bad_ratio}")
        return found


@dataclass
class PackedText:
    """Token ids with their positions and, for dialogues, roles and turns; four lists of one length."""

    ids: List[int]
    positions: List[int]
    roles: List[int]
    turns: List[int]


def pack_source(segments, tokenizer, max_len, role=0, turn=0):
    """``[CLS] segment [SEP] segment [SEP] ...``; positions start anew, at 3, in every segment.

    Args:
        segments: (ids, role, turn) triples; one that is too long keeps its first ``max_len - 2`` tokens.
        role, turn: of [CLS].
    """
    packed = PackedText([tokenizer.cls_id], [FIRST_POSITION], [role], [turn])
    for ids, own_role, own_turn in segments:
        part = [*ids[: max_len - 2], tokenizer.sep_id]
        packed.ids += part
        packed.positions += range(FIRST_POSITION + 1, FIRST_POSITION + 1 + len(part))
        packed.roles += [own_role] * len(part)
        packed.turns += [own_turn] * len(part)
    return packed


def pack_dialog(turns, knowledge, tokenizer, max_len, max_turns):
    """A dialogue as a source: the passage first (role 2, turn 0), then the last ``max_turns`` turns, counted down to 1, so that the answer
    is turn 0 of role 0.

    Args:
        turns: id list per turn, the last one is to be answered; knowledge: id list or ``None``.
    """
    turns = turns[-max_turns:]
    count = len(turns)
    segments = [] if knowledge is None else [(knowledge, KNOWLEDGE_ROLE, 0)]
    segments += [(ids, (count - number) % 2, count - number) for number, ids in enumerate(turns)]
    return pack_source(segments, tokenizer, max_len, count % 2, count)


def max_turns(config):
    """How many turns of a dialogue a model of this config reads."""
    return config.turn_type_size - 1 if getattr(config, "dialog", False) else MOST_TURNS


def pack_target(ids, tokenizer, max_len):
    """``[CLS] ids [MASK]``, cut to ``max_len``; role and turn 0."""
    ids = [tokenizer.cls_id, *[*ids, tokenizer.mask_id][: max_len - 1]]
    return PackedText(ids, list(range(FIRST_POSITION, FIRST_POSITION + len(ids))), [0] * len(ids), [0] * len(ids))


def _padded(rows, pad_id, dialog):
    arrays = {"input_ids": pad([row.ids for row in rows], pad_id), "position_ids": pad([row.positions for row in rows], PAD_POSITION)}
    if dialog:
        arrays.update(role_ids=pad([row.roles for row in rows], PAD_ROLE), turn_ids=pad([row.turns for row in rows], PAD_ROLE))
    return arrays


def source_arrays(sources, pad_id, dialog):
    """What a model reads before it writes: ``input_ids``, ``position_ids`` int64 ``[B, L]``, ``text_mask`` float32 ``[B, L]``, and with
    ``dialog`` ``role_ids``, ``turn_ids``; ``sources`` are :class:`PackedText`."""
    return {**_padded(sources, pad_id, dialog), "text_mask": pad([[1.0] * len(row.ids) for row in sources], 0.0, np.float32)}


def training_arrays(sources, targets, pad_id, dialog):
    """Sources with their targets behind them, no padding between.

    Returns:
        as :func:`source_arrays`, but ``text_mask`` ``[B, L, L]`` (see :func:`seq2seq_visibility`), ``predict_from`` int64 ``[N]`` (flat
        places whose next token is predicted) and ``labels`` int64 ``[N]``.
    """
    rows = [PackedText(a.ids + b.ids, a.positions + b.positions, a.roles + b.roles, a.turns + b.turns) for a, b in zip(sources, targets)]
    sizes = [(len(source.ids), len(row.ids)) for source, row in zip(sources, rows)]
    length = max(end for _, end in sizes)
    return {**_padded(rows, pad_id, dialog), "text_mask": seq2seq_visibility(sizes, length),
            "predict_from": flat_positions([range(start, end - 1) for start, end in sizes], length),
            "labels": np.concatenate([np.asarray(target.ids[1:], dtype="int64") for target in targets])}


class CellReader:
    """Cells to token ids and back to text.

    Args:
        data: :class:`Seq2SeqData`; tokenizer: ``Tokenizer``.
    """

    def __init__(self, data, tokenizer):
        self.tokenizer, self.tokenized = tokenizer, data.tokenized
        self.keys = vocabulary_keys(data.vocab) if data.tokenized else {}

    def problem(self, cell):
        """What is wrong with a cell, "" for nothing."""
        unknown = set(cell.split()) - self.keys.keys() if self.tokenized else ()
        return f"{sorted(unknown)[0]!r} is no key of the vocabulary; for cells of plain text set data.tokenized: false" if unknown else ""

    def ids(self, cell):
        """Token ids; ``[SEP]`` between blanks is the separator token in both kinds of files."""
        if self.tokenized:
            return [self.keys[key] for key in cell.split()]
        return encode_parts(cell, self.tokenizer)

    def text(self, cell):
        """The cell as text."""
        return self.tokenizer.decode(self.ids(cell)).strip() if self.tokenized else cell


def encode_parts(text, tokenizer):
    """Token ids of a text; the separator token stands where it says ``[SEP]``."""
    ids = []
    for number, part in enumerate(text.split(SEPARATOR)):
        ids += [tokenizer.sep_id] * bool(number) + tokenizer.encode(part)
    return ids


class Seq2SeqDataset:
    """A split of a data set.

    Args:
        data: :class:`Seq2SeqData`; tokenizer: ``Tokenizer``; split: its name.
        most_turns: of a dialogue that are read; max_records: the first ones (0: all).

    Attributes:
        cut_targets: how many targets are longer than ``max_target_len``; labelled: whether there are targets; dialog: whether sources are dialogues.
    """

    def __init__(self, data, tokenizer, split, most_turns=MOST_TURNS, max_records=0):
        self.data, self.tokenizer, self.most_turns = data, tokenizer, most_turns
        self.dialog = SEQ2SEQ[data.dataset].dialog
        self.cells, self.cut_targets = CellReader(data, tokenizer), 0
        path = seq2seq_file(data.directory, data.dataset, split)
        self.file = Seq2SeqFile(path, self._inspect, data.max_bad_ratio if split == "train" else 0.0)
        self.labelled = "tgt" in self.file.columns
        if split == "train" and not self.labelled:
            raise DataError(f"{path}: has no column tgt to learn from")
        if self.cut_targets:
            logger.warning("%s: %d of %d targets are longer than data.max_target_len %d and lose their end", path, self.cut_targets,
                           len(self.file), data.max_target_len)
        place = data.references.replace("{split}", split) if data.references and split != "train" else ""
        self._references = read_references(place, len(self.file)) if place else None
        self.size = min(len(self.file), max_records) if max_records else len(self.file)

    def _inspect(self, record):
        for cell in (*record.sources, record.knowledge, record.target):
            problem = self.cells.problem(cell) if cell else ""
            if problem:
                return problem
        limit = self.data.max_target_len - 2
        # a target of so few characters cannot have too many tokens, so only long ones are tokenised
        if record.target and len(record.target.encode()) > limit and len(self.cells.ids(record.target)) > limit:
            self.cut_targets += 1
        return ""

    def __len__(self):
        return self.size

    def source(self, record):
        """The :class:`PackedText` of a record's source."""
        if not self.dialog:
            return pack_source([(self.cells.ids(cell), 0, 0) for cell in record.sources], self.tokenizer, self.data.max_source_len)
        turns = [self.cells.ids(turn) for cell in record.sources for turn in cell.split(SEPARATOR)]
        knowledge = None if record.knowledge is None else self.cells.ids(record.knowledge)
        return pack_dialog(turns, knowledge, self.tokenizer, self.data.max_source_len, self.most_turns)

    def sample(self, index, rng):
        """(source, target) as :class:`PackedText`, the target ``None`` in evaluation; ``rng`` says which it is."""
        record = self.file[index]
        target = None if rng is None else pack_target(self.cells.ids(record.target), self.tokenizer, self.data.max_target_len)
        return self.source(record), target

    def references(self, index):
        """The texts to judge a record by, whole."""
        return self._references[index] if self._references else [self.cells.text(self.file[index].target)]

    def shown(self, index):
        """What reports say of a record: ``id`` (its line in the file, from 0, without the header), ``source``, ``knowledge``."""
        record = self.file[index]
        shown = {"id": record.line - 2, "source": " [SEP] ".join(self._parts(record.sources))}
        return shown if record.knowledge is None else {**shown, "knowledge": self.cells.text(record.knowledge)}

    def passage(self, index):
        """The text a baseline copies from: the passage of a dialogue, else the last part of the last source."""
        record = self.file[index]
        return self.cells.text(record.knowledge) if record.knowledge else self._parts(record.sources)[-1]

    def _parts(self, cells):
        return [self.cells.text(part) for cell in cells for part in cell.split(SEPARATOR)]
