"""Reading documents out of files, one at a time: text, JSON, Parquet, Arrow and WARC, compressed or not.

Memory stays bounded by one document (text is read in pieces, a JSON line has a limit, tables come in small batches),
so the size of a corpus does not matter. What cannot be used is counted in a ``Tally``, never silently dropped. Every
document carries the ``Place`` after it.
"""

from poise.data.readers.columns import read_arrow, read_parquet
from poise.data.readers.document import Document, Place, Tally
from poise.data.readers.encoding import clean, decode
from poise.data.readers.jsonl import read_json, read_jsonl
from poise.data.readers.text import read_text

__all__ = [
    "Document",
    "Place",
    "Tally",
    "clean",
    "decode",
    "read_arrow",
    "read_json",
    "read_jsonl",
    "read_parquet",
    "read_text",
]
