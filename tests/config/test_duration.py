from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.config import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("10ep", 10, "ep"),
        ("500st", 500, "st"),
        ("1.2e6ex", 1_200_000, "ex"),
        ("50%", 50, "%"),
        (" .5 ep ", Fraction(1, 2), "ep"),
    ],
)
def test_reads_every_unit(text: str, value: Fraction, unit: str) -> None:
    assert Duration.parse(text) == Duration(Fraction(value), unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [10, 1.5, "10", "ten ep", "-1ep", "1 epoch", "", None, True, "nan ep", "1e999x"])
def test_refuses_the_rest_and_shows_the_legal_forms(bad: object) -> None:
    with pytest.raises(ValueError, match='"10ep"'):
        Duration.parse(bad)


def test_samples_round_up_and_are_exact() -> None:
    assert Duration.parse("5ep").samples(epoch=1_281_167, batch=8192) == 6_405_835
    assert Duration.parse("10%").samples(epoch=1, batch=1, whole=101) == 11
    # 0.1 has no exact float; as a fraction a tenth of ten epochs is one epoch.
    assert Duration.parse("0.1ep").samples(epoch=10, batch=1) == 1


def test_a_share_needs_a_whole() -> None:
    with pytest.raises(ValueError, match="50%"):
        Duration.parse("50%").samples(epoch=1, batch=1)


@given(st.integers(0, 10**9), st.sampled_from(["ep", "st", "ex", "%"]))
def test_text_round_trip(number: int, unit: str) -> None:
    duration = Duration.parse(f"{number}{unit}")
    assert Duration.parse(str(duration)) == duration
