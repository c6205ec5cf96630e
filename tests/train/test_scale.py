from bigbatch.train.scale import LossScale


def test_halves_on_overflow_and_doubles_after_an_interval() -> None:
    scale = LossScale(value=1024.0, interval=3)
    scale.update(finite=False)
    assert scale.value == 512
    for _ in range(3):
        scale.update(finite=True)
    assert scale.value == 1024
    scale.update(finite=True)
    scale.update(finite=False)
    for _ in range(2):
        scale.update(finite=True)
    assert scale.value == 512
