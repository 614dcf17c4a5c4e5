"""`meta_tune`, the public function: the steps of main.py over any episodes, without a run around them."""

import pytest
from toy_pools import assert_identical, make_episode, quick, tensors

import amt

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_takes_the_steps_of_a_tuner_and_leaves_the_pool(network, pool):
    before = {name: tensor.clone() for name, tensor in tensors(pool).items()}
    episodes, settings = [make_episode(k) for k in range(3)], quick()
    tuner = amt.Tuner(network, pool, settings)
    for episode in episodes:
        tuner.step(episode)
    assert_identical(tensors(amt.meta_tune(network, pool, iter(episodes), settings)), tensors(tuner.pool))
    assert_identical(tensors(pool), before)


def test_it_ends_with_the_epochs_of_the_settings(network, pool):
    """Of more episodes, and be they without end, no more are taken than the schedule has."""
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield make_episode(len(taken))

    settings = quick(epochs=1, episodes_per_epoch=2)
    amt.meta_tune(network, pool, endless(), settings)
    assert len(taken) == 2


def test_no_episode_is_no_step(network, pool):
    assert_identical(tensors(amt.meta_tune(network, pool, [])), tensors(pool))
