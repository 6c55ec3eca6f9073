"""The sums of the roofline page, against numbers worked out by hand."""

import pytest

from benchmarks import roofline

SHAPE = roofline.Shape("tiny", images=2, heads=3, queries=5, keys=4, head_dim=8)
DEVICE = roofline.Device("round", 80, multiprocessors=10, clock=2.0, tflops=4, bandwidth=100)


def test_forward_moves_each_tensor_once():
    # Query and output: 2 * 3 * 5 * 8 = 240 numbers each; key and value: 192 each; log-sum-exp: 30 of 4 bytes.
    # Labels: shares of 8 keys, residuals and new shares of 10 queries.
    done = roofline.work(SHAPE, "forward")
    assert done.label_bytes == 4 * (8 + 10 + 10)
    assert done.bytes == 2 * (2 * 240 + 2 * 192) + 120 + done.label_bytes
    # 120 scores: two products of 8 multiply-adds each, and one of the label.
    assert done.flops == 120 * 2 * (8 + 8 + 1)
    assert (done.label_flops, done.exponentials) == (240, 120)


def test_backward_moves_gradients_too_and_no_labels():
    done = roofline.work(SHAPE, "backward")
    assert done == roofline.Work(2 * (4 * 240 + 4 * 192) + 120, 0, 120 * 2 * 5 * 8, 0, 120)


def test_floors_are_the_peaks():
    # 1e6 bytes at 100 GB/s; 1e9 FLOPs at 4 TFLOPS; 32 million exponentials, 16 * 10 a clock, two clocks a nanosecond.
    floors = roofline.floors(roofline.Work(10**6, 0, 10**9, 0, 32 * 10**6), DEVICE)
    assert floors == pytest.approx({"memory": 10, "tensor cores": 250, "exponentials": 100})


def test_cycles_of_a_head_become_time():
    # Six heads of 20000 cycles on 10 multiprocessors of 2 GHz.
    assert roofline.microseconds(20000, SHAPE, DEVICE) == pytest.approx(6.0)


def test_a_matrix_is_written_and_read():
    assert roofline.matrix_bytes(SHAPE) == 120 * 2 * 2
