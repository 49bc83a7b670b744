"""Log lines and the progress bar on one terminal."""

from tests.cli.helpers import on_a_terminal


def test_log_lines_come_out_whole_above_the_bar() -> None:
    code = (
        "import logging, time; from deploy.cli import common; from deploy.cli.log import show_log\n"
        "common._QUIET_S = 0.05; show_log()\n"
        "with common.progress_bar() as progress:\n"
        "    progress('exporting [net]')\n"
        "    for index in range(3):\n"
        "        time.sleep(0.3)\n"
        "        logging.getLogger('deploy.x').warning('line [bold]%d of%s end', index, ' some words' * 20)\n"
        "    progress('exporting', 1, 2); time.sleep(0.2)\n"
        "logging.getLogger('deploy.x').info('after')"
    )
    shown, _ = on_a_terminal(code)
    assert "exporting [net]" in shown
    # What stays on the screen: of every line, that which follows the last return to its start and erasure.
    lines = [line.rpartition("\x1b[2K")[2] for line in shown.replace("\r\n", "\n").splitlines()]
    for index in range(3):
        assert f"warning: line [bold]{index} of{' some words' * 20} end" in lines
    assert lines[-1].endswith("after")
    assert "1/2" in shown
