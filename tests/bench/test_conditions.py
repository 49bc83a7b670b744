import json
import sys

from deploy.bench.conditions import conditions
from deploy.host.versions import versions


def test_a_library_that_is_missing_has_no_version() -> None:
    assert versions(("numpy", "no-such-library"))["no-such-library"] is None
    assert versions(())["python"] == ".".join(map(str, sys.version_info[:3]))


def test_conditions_are_json() -> None:
    found = conditions(threads=2, device="cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == 2
