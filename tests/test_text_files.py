from pathlib import Path

import pytest

from text_files import csv_row, read_json
from utils import UserError


@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path, mark):
    path = tmp_path / 'a.json'
    path.write_bytes(mark + '{"größer": [1]}'.encode())
    assert read_json(path, 'a file', UserError) == {'größer': [1]}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, r'^a file cannot be read \(No such file or directory\): find it$'),
        (b'{"a": ', r'^a file is not JSON \(Expecting value.*\): find it$'),
        (b'', r'^a file is not JSON \(Expecting value.*\): find it$'),
        (b'["\xff"]', r"^a file is not JSON \('utf-8' codec can't decode byte 0xff.*\): find it$"),
    ],
)
def test_what_is_no_json_is_reported_in_one_line(tmp_path, content, message):
    path = tmp_path / 'a.json'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(path, 'a file', UserError, 'find it')


def test_csv_rows_are_quoted_where_necessary():
    assert csv_row(['a', 1, 'b, "c"', '']) == 'a,1,"b, ""c""",\n'


def test_csv_cells_are_not_run_by_a_spreadsheet():
    cells = ['=cmd()', '+1', '-1', '@a', '\tb', Path('=x.png'), -1.5, 'a=b', '']
    assert csv_row(cells) == "'=cmd(),'+1,'-1,'@a,'\tb,'=x.png,-1.5,a=b,\n"
