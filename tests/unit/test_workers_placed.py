"""Which workers fit on the nodes of a cluster, and what is said of those that do not."""

import dataclasses

import pytest
from small_training import small_config

from alexnet.errors import UserError
from training.config import TrainConfig
from training.preflight import placed


def asked(**fields: object) -> TrainConfig:
    return dataclasses.replace(small_config(), **fields)


@pytest.mark.parametrize(
    ("fields", "nodes", "alone", "told"),
    [
        ({"device": "cuda", "workers": 2}, [{"CPU": 2.0}], False, "2 workers need a GPU each, the"),
        ({"device": "cuda"}, [{"CPU": 2.0}], True, "1 workers need a GPU each, this machine has 0"),
        ({"device": "cpu"}, [{"CPU": 0.0}], False, "1 workers need a CPU each, no node of the clu"),
        ({"device": "cpu"}, [{"memory": 9.0}], False, "1 workers need a CPU each, no node of the"),
    ],
)
def test_workers_that_find_no_place_are_refused_with_the_remedy(fields, nodes, alone, told):
    with pytest.raises(UserError) as refused:
        placed(asked(**fields), nodes, alone=alone)
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "nodes", "given"),
    [
        ({"device": "cpu", "workers": 1}, [{"CPU": 0.0}, {"CPU": 8.0}], (8, False)),
        ({"device": "cpu", "workers": 4}, [{"CPU": 8.0}, {"CPU": 8.0}], (4, False)),
        ({"device": "auto", "workers": 2}, [{"CPU": 16.0, "GPU": 2.0}], (8, True)),
        ({"device": "auto", "workers": 2}, [{"CPU": 16.0, "GPU": 1.0}], (8, False)),
        (
            {"device": "auto", "workers": 8, "min_workers": 2},
            [{"CPU": 16.0, "GPU": 2.0}],
            (8, True),
        ),
    ],
)
def test_cpus_of_the_nodes_are_shared_among_the_workers(fields, nodes, given):
    assert placed(asked(**fields), nodes) == given
