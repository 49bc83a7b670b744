"""Triton's classification extension."""

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor

from deploy.serving.classes import classes_of, pack


def test_the_likeliest_come_first_with_score_index_and_name() -> None:
    found = classes_of(np.array([[0.5, 2.0, -1.0], [7.0, 7.0, 8.0]], np.float32), 2, ["cat", "dog", "owl"])
    assert found.tolist() == [[b"2.000000:1:dog", b"0.500000:0:cat"], [b"8.000000:2:owl", b"7.000000:0:cat"]]


def test_without_a_name_for_each_score_there_are_none() -> None:
    assert classes_of(np.array([[3, 2**63 + 1]], np.uint64), 1, ["only one"]).tolist() == [[b"9223372036854775809:1"]]
    assert classes_of(np.zeros((2, 2, 2)), 9, None).shape == (2, 4)
    assert classes_of(np.array([1.0, 2.0]), 1, None).shape == (1,)


def test_strings_are_packed_as_clients_unpack_them() -> None:
    texts = np.array([[b"a", b"", "ü".encode()]], dtype=object)
    assert deserialize_bytes_tensor(pack(texts)).tolist() == texts.reshape(-1).tolist()
