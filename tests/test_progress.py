import io

from bakeoff.progress import Steps


class Terminal(io.StringIO):
    def isatty(self):
        return True


LINES = [
    "[1/2] unet: onnx:fp32",
    "note: something",
    "[2/2] vae_decoder: onnx:fp32",
    "proving each part in a child process",
]


def test_lines_stay_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Steps(stream) as progress:
        for line in LINES:
            progress(line)
    assert stream.getvalue().splitlines() == LINES


def test_a_bar_counts_parts_and_proof_on_a_terminal():
    stream = Terminal()
    with Steps(stream) as progress:
        for line in LINES:
            progress(line)
    shown = stream.getvalue()
    assert "unet: onnx:fp32" in shown
    assert "0/3" in shown
    assert "2/3" in shown
    assert "note: something\n" in shown
