"""Runs by torchrun in two processes: patched models under DDP and FSDP must give what one process gives.

Arguments are the names of those that DDP has compiled as well.
"""

import itertools
import os
import sys
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import tlalign_kernels as tlk

VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2)
MODELS = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, patch_size=2, window_size=5, embed_dim=32, depths=(2, 2), num_heads=(2, 4)
    ),
    "vit_small_patch16_rope_mixed_224": VIT,
    "pvt_v2_b0": dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    compiled = sys.argv[1:]
    for name in MODELS:
        check_ddp(name, compiled)
        check_fsdp(name)
        check_first_fsdp(name)
    check_tune()
    dist.destroy_process_group()
    print(f"rank {os.environ['RANK']} passed", flush=True)


def build(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.0, **MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return tlk.patch_model(model)


def blocks_of(model):
    return [module for module in model.modules() if hasattr(module, "attn")]


def batch(images=slice(None)):
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[0, 0, 16, 32], [3, 5, 30, 20], [0, 0, 32, 32], [8, 8, 9, 9]])[:, None]
    classes = torch.randint(0, 10, (4, 2), generator=generator)
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    return pixels[images], tlk.MixedTarget.from_boxes(classes[images], boxes[images], (32, 32))


def step(model, pixels, target):
    logits, aligned = model(pixels, target=target)
    tlk.mixed_cross_entropy(logits, aligned, smoothing=0.1).backward()
    return aligned


def expected(name):
    model = build(name)
    return step(model, *batch()), {key: p.grad for key, p in model.named_parameters()}


def own_half():
    return slice(0, 2) if dist.get_rank() == 0 else slice(2, 4)


def record_share(dtypes, module, inputs, output):
    dtypes.append(output[1].dtype)


def check_ddp(name, compiled):
    aligned, gradients = expected(name)
    # Compiling takes most of the time.
    for compiles, checkpoints in itertools.product((False, True) if name in compiled else (False,), (False, True)):
        model = build(name)
        model.set_grad_checkpointing(checkpoints)
        inner = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        half = step(DistributedDataParallel(inner), *batch(own_half()))
        assert half.ratio.dtype == torch.float32
        torch.testing.assert_close(half.ratio, aligned.ratio[own_half()], rtol=0, atol=1e-6)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6)


def shard(name, **policy_options):
    model = build(name)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, **policy_options)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def check_fsdp(name):
    aligned, gradients = expected(name)
    pixels, target = batch(own_half())
    for dtype, checkpointing in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        # Casting the inputs of a block would cast its share; the images are cast once, at the root.
        model = shard(name, param_dtype=dtype, cast_forward_inputs=False)
        model.set_grad_checkpointing(checkpointing)
        dtypes = []
        for block in blocks_of(model):
            block.register_forward_hook(partial(record_share, dtypes))
        half = step(model, pixels.to(dtype), target)
        assert len(dtypes) >= 2 and set(dtypes) == {torch.float32}, dtypes
        assert half.ratio.dtype == torch.float32
        tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
        torch.testing.assert_close(half.ratio, aligned.ratio[own_half()], rtol=0, atol=tolerance)
        if dtype == torch.float32:
            for key, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad.full_tensor(), gradients[key], rtol=1e-4, atol=1e-6)
    try:
        step(shard(name, param_dtype=torch.bfloat16), pixels, target)
    except TypeError as error:
        assert "share: expected torch.float32, got torch.bfloat16" in str(error)
        assert "cast_forward_inputs=False" in str(error)
    else:
        raise AssertionError("a share that was cast to bfloat16 was accepted")


def check_first_fsdp(name):
    # Unlike FSDP2 it puts each block into a module of its own.
    aligned, gradients = expected(name)
    model = build(name)
    policy = ModuleWrapPolicy({type(block) for block in blocks_of(model)})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    assert all(isinstance(block, FullyShardedDataParallel) for block in model.label_blocks(model))
    half = step(wrapped, *batch(own_half()))
    torch.testing.assert_close(half.ratio, aligned.ratio[own_half()], rtol=0, atol=1e-6)
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        for key, parameter in model.named_parameters():
            name_of_own = key.replace("_fsdp_wrapped_module.", "")
            torch.testing.assert_close(parameter.grad, gradients[name_of_own], rtol=1e-4, atol=1e-6)


def check_tune():
    tuning = sys.modules["tlalign_kernels.tuning"]
    if dist.get_rank() > 0:
        tuning._time_all = None  # only rank 0 may time
    model = build(next(iter(MODELS)))
    choices = tlk.tune(lambda: step(model, *batch(own_half())))
    everywhere = [None, None]
    dist.all_gather_object(everywhere, choices)
    assert everywhere[0] == everywhere[1]
    assert list(tuning.TUNED.values()) == [choices[0].backend]
    # Whatever fails on rank 0, the other does not wait for it.
    with pytest.raises(RuntimeError if dist.get_rank() else TypeError, match="PathLike"):
        tlk.tune(lambda: step(model, *batch(own_half())), cache=5)


if __name__ == "__main__":
    main()
