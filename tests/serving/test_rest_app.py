"""Calls of the REST door beside inference."""

import json
import urllib.request
from pathlib import Path

import deploy
from deploy.artifact.artifact import Artifact

from .conftest import LOAD, Server, call


def test_models_cannot_be_uploaded_or_loaded_from_elsewhere(limited: Server) -> None:
    status, document, _ = call(limited, LOAD, json.dumps({"parameters": {"config": "{}", "file:1/model.onnx": "aGk="}}).encode())
    assert (status, "nothing is uploaded" in document["error"]) == (403, True)
    assert call(limited, "/v2/repository/models/..%2Fother/load", b"")[0] == 404


def test_images_are_classified_by_the_artifacts_own_preprocessing(limited: Server, shared_lenet5: Artifact, digits: Path) -> None:
    (expected,) = deploy.predict(shared_lenet5, digits / "1.png", top=3)
    data = (digits / "1.png").read_bytes()
    for path in ("/v2/models/digits/classify?top=3", "/v2/models/digits/versions/1/classify?top=3"):
        with urllib.request.urlopen(f"http://{limited.http}{path}", data=data) as answer:
            document = json.load(answer)
        assert [(entry["class"], round(entry["probability"], 5)) for entry in document["classes"]] == [
            (name, round(share, 5)) for name, share in expected.classes
        ]
