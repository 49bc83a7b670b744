import pytest
import torch

from deploy.errors import BackendError
from deploy.runtime.tf32 import Tf32


def test_tf32_is_held_by_all_that_agree_and_put_back_by_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = allowed()
    try:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
        tf32 = Tf32()
        tf32.hold(allow=False)
        tf32.hold(allow=False)
        assert allowed() == (False, False)
        with pytest.raises(BackendError, match="another session of this process runs without TF32"):
            tf32.hold(allow=True)
        tf32.release()
        assert allowed() == (False, False)
        tf32.release()
        assert allowed() == (True, False)
        tf32.hold(allow=True)
        assert allowed() == (True, True)
        tf32.release()
        assert allowed() == (True, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
