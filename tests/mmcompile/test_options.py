"""Options: what is refused, and how it is said."""

import pytest
import torch

from mmcompile import OptionError, Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densty": 0.1}, r"unknown option 'densty'; did you mean 'density'\?"),
        ({"density": 0}, r"density=0: must be a number in \(0, 1\]"),
        ({"density": 1.5}, r"density=1.5: must be a number in \(0, 1\]"),
        ({"density": "half"}, r"density='half': must be a number in \(0, 1\]"),
        ({"density": True}, r"density=True: must be a number"),
        ({"min_tokens": -1}, r"min_tokens=-1: must be an integer of at least 0, or None"),
        ({"min_tokens": 1.5}, r"min_tokens=1.5: must be an integer"),
        ({"chunk_tokens": -1}, r"chunk_tokens=-1: must be an integer of at least 0, or None"),
        ({"check": 0}, r"check=0: must be a number in \(0, 1\], or None"),
        ({"check": 0.1, "check_bound": 0.0}, r"check_bound=0.0: must be a number above 0"),
        ({"check_bound": 0.1}, r"check_bound=0.1: nothing is checked without check, such as check=0.01"),
        ({"strict": 1}, r"strict=1: must be True or False"),
        ({"inner": "mminference"}, r"inner='mminference': must name another backend"),
        ({"inner": "nope"}, r"inner='nope': must name another backend: .*inductor"),
        ({"disable": "fold_permutations"}, r"disable='fold_permutations': must be a list of pass names"),
        ({"disable": ["fold"]}, r"no pass 'fold'; choose from"),
        ({"patterns": 3}, r"patterns=3: must be \"auto\""),
        (
            {"patterns": "nowhere.json"},
            r"patterns='nowhere.json': neither \"auto\" nor a readable pattern table",
        ),
    ],
)
def test_a_bad_option_is_one_clear_error(options, message):
    with pytest.raises(OptionError, match=message):
        Options.parse(options)


def test_equal_options_are_equal_so_that_nothing_recompiles():
    assert Options.parse({"density": 0.5}) == Options(density=0.5)
    assert Options.parse(None) == Options()


def test_a_path_that_holds_no_table_is_one_clear_error(tmp_path):
    with pytest.raises(OptionError, match='neither "auto" nor a readable pattern table'):
        Options(patterns=str(tmp_path / "missing.json"))


def test_the_backend_refuses_bad_options_in_one_line_before_anything_runs():
    ran = []

    def model(x):
        ran.append(x)
        return x + 1

    compiled = torch.compile(model, backend="mminference", options={"densty": 0.1})
    with pytest.raises(OptionError, match="did you mean 'density'") as raised:
        compiled(torch.zeros(2))
    # What torch appends is a hint of its own; nothing of Dynamo's own stack stands before our line.
    assert str(raised.value).startswith("unknown option 'densty'")
    assert not ran
