"""Rewriting captions and retrieving related pictures and texts, ahead of UNIMO's cross-modal contrastive learning.

A room of its own because nothing here runs during training: the steps read corpora through ``data`` and write files that a batch
builder looks up by record key (``Augmentations``). Every step can be interrupted, repeated and shared by several processes, and
what it writes for a record is a function of the seed, the record's key and the index alone.
"""
