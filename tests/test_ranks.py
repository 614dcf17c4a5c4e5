"""Meta-training by several processes at once: the run of one process, to the same bits."""

import pytest
from toy_ranks import ranks
from toy_training import command
from commands import same_tensors


def test_try(world, tmp_path):
    import time
    t=time.time()
    a = command("main", *world.train(tmp_path / "one"))
    print(a, time.time()-t); t=time.time()
    b = ranks(world.train(tmp_path / "two"), 2, tmp_path / "printed")
    print(b, time.time()-t)
    for n in ("last","best"):
        print(same_tensors(tmp_path / "one" / f"{n}.safetensors", tmp_path / "two" / f"{n}.safetensors"))
    assert 0
