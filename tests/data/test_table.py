import os
import sys

import pytest

from deploy.data.table import find_table, read_table
from deploy.errors import BackendError, DataError


def test_rows_belong_to_images_by_the_path_from_the_folder_on(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,age,place\na/1.png,7,x\n./b/../a/2.png,8,\n")
    table = read_table(tmp_path / "metadata.csv")
    assert table.columns == ("file_name", "age", "place")
    assert {path: row["age"] for path, row in table.rows.items()} == {tmp_path / "a/1.png": "7", tmp_path / "a/2.png": "8"}


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbffile_name,age\na.png,7\n",  # as spreadsheets write it
        b"file_name,age\r\na.png,7\r\n\r\n",
        b"file_name , age\na.png,7\n",
        b'"file_name","age"\n"a.png","7"',
    ],
)
def test_csv_is_read_as_programs_write_it(tmp_path, text):
    (tmp_path / "metadata.csv").write_bytes(text)
    assert [row["age"] for row in read_table(tmp_path / "metadata.csv").rows.values()] == ["7"]


def test_the_name_of_an_image_may_be_no_utf8(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(b"file_name,age\ncaf\xe9.png,7\n")
    (path,) = read_table(tmp_path / "metadata.csv").rows
    assert os.fsencode(path).endswith(b"/caf\xe9.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none; expected file_name"),
        ("path,age\na.png,7\n", "has the columns path, age; expected file_name"),
        ("file_name,age,age\na.png,7,8\n", "two columns called 'age'"),
        ("file_name,age\na.png,7\nb.png\n", "row 2 has 1 cells, and there are 2 columns"),
        ("file_name,age\na.png,7\nb.png,1,2\n", "row 2 has 3 cells"),
        ("file_name,age\n,7\n", "row 1 has no file_name"),
        ("file_name,age\na.png,7\n./a.png,8\n", r"two rows for \./a\.png"),
        ('file_name,age\na.png,"7\n', "cannot be read as CSV"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path, text, message):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "metadata.csv")


def test_one_table_is_found_and_two_are_refused(tmp_path):
    assert find_table(tmp_path) is None
    (tmp_path / "metadata.csv").write_text("file_name\n")
    assert find_table(tmp_path) == tmp_path / "metadata.csv"
    (tmp_path / "metadata.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds metadata\.csv and metadata\.parquet"):
        find_table(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        BackendError, match=r"metadata\.parquet needs pyarrow, which is not installed: pip install 'deploy\[parquet\]'"
    ):
        read_table(tmp_path / "metadata.parquet")


def test_parquet_has_lists_and_numbers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"file_name": ["a.png"], "v": [[1.0, 2.5]], "n": [3]}), tmp_path / "metadata.parquet")
    assert read_table(tmp_path / "metadata.parquet").rows == {tmp_path / "a.png": {"file_name": "a.png", "v": [1.0, 2.5], "n": 3}}
    (tmp_path / "metadata.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_table(tmp_path / "metadata.parquet")
