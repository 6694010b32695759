"""What the runner does before VBench: no network, and torchvision without its compiled library."""

import subprocess
import sys

import pytest
import torch

from evaluation.vbench_runner import NetworkRefusedError, greedy_suppression, refuse_network


def test_suppression_keeps_the_best_of_overlapping_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 5]])
    scores = torch.tensor([0.8, 0.9, 0.1, 0.5])
    # IoU of boxes 0 and 1 is 90/110, of 1 and 3 is 45/105.
    assert greedy_suppression(boxes, scores, 0.5).tolist() == [1, 3, 2]
    assert greedy_suppression(boxes, scores, 0.4).tolist() == [1, 2]
    assert greedy_suppression(boxes, scores, 0.9).tolist() == [1, 0, 3, 2]
    assert greedy_suppression(boxes[:0], scores[:0], 0.5).tolist() == []


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("subprocess.Popen", ("wget", ["wget", "x"], None, None)),
        ("subprocess.Popen", ("/usr/bin/git", ["git"], None, None)),
        ("socket.connect", (None, ("192.0.2.1", 443))),
        ("socket.getaddrinfo", ("example.org", 443, 0, 0, 0)),
    ],
)
def test_every_way_out_is_refused(event, arguments):
    with pytest.raises(NetworkRefusedError, match="wanted to fetch"):
        refuse_network(event, arguments)


def test_other_children_and_local_sockets_are_let_through():
    refuse_network("subprocess.Popen", ("ldconfig", ["ldconfig", "-p"], None, None))
    refuse_network("socket.connect", (None, "/run/local.sock"))


def test_the_hook_works_where_it_counts():
    program = (
        "import sys, urllib.request; from evaluation.vbench_runner import refuse_network\n"
        "sys.addaudithook(refuse_network)\n"
        "urllib.request.urlopen('http://192.0.2.1/weights.pth', timeout=5)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "NetworkRefusedError" in done.stderr
