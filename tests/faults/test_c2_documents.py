"""Documents that cannot be read: one line each, streamed or not."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from pd_jax.data.fineweb import load_documents, segments
from pd_jax.data.text import BadRows

LINES = "".join(json.dumps({"text": f"{i} the tower is red"}) + "\n" for i in range(2000)).encode()


def read(path, streaming, bad=None):
    documents = load_documents(str(path), streaming=streaming)
    return list(segments(documents, tiny.tokenizer(), 64, 319, name=path.name, bad=bad or BadRows()))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "are empty"),
        ("x.json", b"[]", "are empty"),
        ("x.json", b"[1, 2", "damaged or cut off"),
        ("x.jsonl.gz", b"no gzip", "damaged or cut off"),
        ("x.jsonl", b'{"body": "x"}\n', r"have columns \['body'\] but no 'text'"),
        ("x.parquet", b"no parquet", "cannot be loaded"),
        ("x.parquet", {"text": [b"\xff\xfe"]}, "the column 'text' is binary, not text"),
        ("x.parquet", {"text": [["a", "b"]]}, "the column 'text' is .*, not text"),
        ("x.parquet", {"text": [1, 2]}, "the column 'text' is int64, not text"),
        ("x.parquet", {"body": ["a"]}, r"have columns \['body'\] but no 'text'"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_files(tmp_path, name, content, message, streaming):
    if isinstance(content, dict):
        pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"documents .*{message}") as error:
        load_documents(str(tmp_path / name), streaming=streaming)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cut_gzip_is_named_and_its_good_rows_can_be_had(tmp_path, streaming):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(LINES)[:-2000])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz': row \d+: the file is damaged or cut off"):
        read(path, streaming)
    rows = read(path, streaming, bad := BadRows(skip=True))
    assert 0 < len(rows) < 2000
    assert bad.count == 1


@pytest.mark.parametrize("files", [{}, {"x.bin": b"\0"}], ids=str)
def test_directories_without_documents(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_documents(str(tmp_path))


def test_another_file_under_the_same_name_is_read_anew(tmp_path):
    for text in ("the tower", "the long river"):
        (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}))
        [row] = read(tmp_path / "x.jsonl", streaming=False)
        assert tiny.tokenizer().decode(row["ids"]) == text
