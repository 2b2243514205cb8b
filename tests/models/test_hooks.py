"""Hooks: unknown names, silent hooks, order, exact removal, stale hook points, and what is read how often."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tl_em.errors import HookError, HookNotFiredError, NotAdditiveError, UnknownHookError
from tl_em.models import hooks as points_module
from tl_em.models import residual_writes
from tl_em.models.hooks import LensModel, hook_name, hook_points, hooked, read_point
from tl_em.models.loading import load_model
from tl_em.models.residual_writes import write_points
from tl_em.models.sites import Site

from ..conftest import SURFACES, make_hf_model, make_tokenizer

pytestmark = pytest.mark.surface

TOKENS = torch.tensor([[2, 7, 9, 17, 20]])
RESID = "blocks.1.hook_resid_post"


def nothing(x: torch.Tensor, hook: Any) -> None: ...


def double(x: torch.Tensor, hook: Any) -> torch.Tensor:
    return 2 * x


def attached(model: LensModel) -> int:
    return sum(
        len(point.fwd_hooks) + len(point._forward_hooks)
        for point in {id(p): p for p in hook_points(model).values()}.values()
    )


def test_a_tensor_library_model_is_a_lens_model(small_model: LensModel) -> None:
    assert isinstance(small_model, LensModel)
    assert not isinstance(torch.nn.Linear(1, 1), LensModel)


def test_hooks_change_the_output_and_leave_nothing_behind(model: LensModel) -> None:
    before, count = model(TOKENS), attached(model)
    with hooked(model, [(RESID, double), ("blocks.0.hook_mlp_out", double)]) as same:
        assert same is model
        assert not torch.allclose(model(TOKENS), before, atol=1e-3)
    assert torch.equal(model(TOKENS), before)
    assert attached(model) == count


def test_unknown_names_raise_with_near_matches_before_anything_is_attached(small_model: LensModel) -> None:
    count = attached(small_model)
    with pytest.raises(UnknownHookError, match=r"blocks\.1\.hook_resid_pots.*near names: .*blocks\.1\.hook_resid_post"):
        with hooked(small_model, [(RESID, double), ("blocks.1.hook_resid_pots", double)]):
            raise AssertionError("the body ran")
    assert attached(small_model) == count


def test_tl_itself_ignores_an_unknown_name_on_the_bridge_of_version_3(make_model: Callable[..., LensModel]) -> None:
    """The trap is real where it is: this is why names are checked here (HookedTransformer and TL 4 raise)."""
    model = make_model("gpt2", "bridge")
    before = model(TOKENS)
    try:
        with model.hooks(fwd_hooks=[("blocks.1.no_such_hook", double)]):
            assert torch.equal(model(TOKENS), before)
    except (KeyError, ValueError, AttributeError):
        assert "hooked" not in SURFACES


GATED = {"hooked": "blocks.0.hook_mlp_in", "bridge": "blocks.0.attn.hook_result"}


def test_a_gated_hook_raises_at_the_end_of_a_full_forward(small_model: LensModel, surface: str) -> None:
    name = GATED[surface]
    assert name in hook_points(small_model)
    with pytest.raises(HookNotFiredError, match=name.replace(".", r"\.")):
        with hooked(small_model, [(RESID, nothing), (name, double)]):
            small_model(TOKENS)
    with hooked(small_model, [(name, double)], check=False):
        small_model(TOKENS)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # in TransformerLens's generate
@pytest.mark.parametrize("run", ["run_with_hooks", "generate"])
def test_a_full_forward_is_seen_inside_tl_methods_too(small_model: LensModel, surface: str, run: str) -> None:
    """HookedTransformer's run_with_hooks and generate call forward directly, past hooks on the model itself."""
    calls: dict[str, Callable[[], Any]] = {
        "run_with_hooks": lambda: small_model.run_with_hooks(TOKENS, fwd_hooks=[]),  # type: ignore[attr-defined]
        "generate": lambda: small_model.generate(TOKENS, max_new_tokens=2, verbose=False),
    }
    with pytest.raises(HookNotFiredError):
        with hooked(small_model, [(GATED[surface], double)]):
            calls[run]()
    fired = []
    with hooked(small_model, [(RESID, lambda x, hook: fired.append(x.shape[1]))]):
        calls[run]()
    assert fired == ([5] if run == "run_with_hooks" else [5, 1])


def test_no_firing_check_for_partial_passes_or_none(small_model: LensModel) -> None:
    last = "blocks.2.hook_resid_post"
    with hooked(small_model, [(last, double)]):
        pass
    with hooked(small_model, [(last, double)]):
        small_model(TOKENS, stop_at_layer=1)
    with pytest.raises(ZeroDivisionError):
        with hooked(small_model, [(last, double)]):
            small_model(TOKENS, stop_at_layer=1)
            raise ZeroDivisionError


def test_the_users_exception_is_never_masked(small_model: LensModel, surface: str) -> None:
    count = attached(small_model)
    with pytest.raises(ZeroDivisionError):
        with hooked(small_model, [(GATED[surface], double)]):
            small_model(TOKENS)
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        with hooked(small_model, [(RESID, lambda x, hook: 1 / 0)]):
            small_model(TOKENS)
    assert attached(small_model) == count


def test_user_hooks_stay_in_order_and_run_first(small_model: LensModel) -> None:
    order: list[str] = []
    point = hook_points(small_model)[RESID]
    point.add_hook(lambda x, hook: order.append("user 1"))
    point.add_hook(lambda x, hook: order.append("user 2"), is_permanent=True)
    handles = list(point.fwd_hooks)
    try:
        with hooked(small_model, [(RESID, lambda x, hook: order.append("outer"))]):
            with (
                pytest.raises(ZeroDivisionError),
                hooked(small_model, [(RESID, lambda x, hook: order.append("inner"))]),
            ):
                small_model(TOKENS)
                raise ZeroDivisionError
            small_model(TOKENS)
        small_model(TOKENS)
        assert order == ["user 1", "user 2", "outer", "inner", "user 1", "user 2", "outer", "user 1", "user 2"]
        assert [a is b for a, b in zip(point.fwd_hooks, handles, strict=True)] == [True, True]
    finally:
        point.remove_hooks("fwd", including_permanent=True)


def test_tl_contexts_nest_inside(small_model: LensModel) -> None:
    fired = []
    with hooked(small_model, [(RESID, lambda x, hook: fired.append(1))]):
        small_model.run_with_hooks(TOKENS, fwd_hooks=[(RESID, double)])  # type: ignore[attr-defined]
        small_model.run_with_cache(TOKENS)  # type: ignore[attr-defined]
        with small_model.hooks(fwd_hooks=[(RESID, double)]):
            small_model(TOKENS)
        small_model(TOKENS)
    assert len(fired) == 4


def test_hooks_that_were_removed_inside_raise(small_model: LensModel) -> None:
    with pytest.raises(HookError, match="reset_hooks"), hooked(small_model, [(RESID, double)]):
        small_model(TOKENS)
        small_model.reset_hooks()  # type: ignore[attr-defined]
        small_model(TOKENS)
    assert not hook_points(small_model)[RESID].fwd_hooks


class Counting:
    """A model in all but that reads of ``hook_dict`` are counted."""

    def __init__(self, model: LensModel) -> None:
        self.model, self.reads = model, 0

    @property
    def hook_dict(self) -> Any:
        self.reads += 1
        return self.model.hook_dict

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    cfg = property(lambda self: self.model.cfg)
    hooks = property(lambda self: self.model.hooks)
    to_tokens = property(lambda self: self.model.to_tokens)
    generate = property(lambda self: self.model.generate)


def test_hook_dict_is_read_once_per_model(small_model: LensModel) -> None:
    counting = Counting(small_model)
    names = [name for i in range(3) for name in (f"blocks.{i}.hook_resid_pre", f"blocks.{i}.hook_resid_post")]
    for _ in range(3):
        with hooked(counting, [(name, nothing) for name in names]):
            counting(TOKENS)
    assert counting.reads == 1


def replace_point(model: LensModel, name: str) -> None:
    """What SAELens does when it detaches: another HookPoint in the place of the old one."""
    old = hook_points(model)[name]
    path, _, leaf = old.name.rpartition(".")
    new = type(old)()
    new.name = old.name
    setattr(points_module.at_path(model, path), leaf, new)
    if hasattr(model, "setup"):
        model.setup()  # type: ignore[attr-defined]
    else:
        registry = model._hook_registry  # type: ignore[attr-defined]
        for key in [key for key, point in registry.items() if point is old]:
            registry[key] = new


def test_a_replaced_hook_point_is_noticed(surface: str) -> None:
    model = load_model(make_hf_model("gpt2"), surface=surface, tokenizer=make_tokenizer())
    old = hook_points(model)[RESID]
    with hooked(model, [(RESID, nothing)]):
        model(TOKENS)
    replace_point(model, RESID)
    assert hook_points(model)[RESID] is old, "the cache is stale: this is what must be noticed"
    fired = []
    with hooked(model, [(RESID, lambda x, hook: fired.append(1))]):
        model(TOKENS)
    assert fired == [1]


def test_the_cache_does_not_keep_a_model_alive(surface: str) -> None:
    model = load_model(make_hf_model("gpt2"), surface=surface, tokenizer=make_tokenizer())
    write_points(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# --- Names and write points -------------------------------------------------------------------------------------------


def test_every_stream_can_be_named_and_fires_once(model: LensModel, surface: str) -> None:
    fired: dict[str, int] = {}

    def count(x: torch.Tensor, hook: Any, name: str) -> None:
        fired[name] = fired.get(name, 0) + 1

    sites = [Site(1, stream) for stream in ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")]
    names = [read_point(model, site).name for site in sites]
    with hooked(model, [(n, lambda x, hook, n=n: count(x, hook, n)) for n in names]):
        model(TOKENS)
    assert fired == dict.fromkeys(names, 1)


def test_mlp_in_is_what_the_mlp_reads(model: LensModel) -> None:
    seen: dict[str, torch.Tensor] = {}
    point = read_point(model, Site(1, "mlp_in"))
    mlp = model.blocks[1].mlp  # type: ignore[attr-defined]
    handle = mlp.register_forward_pre_hook(lambda module, args, kwargs: seen.update(true=args[0]), with_kwargs=True)
    try:
        with hooked(model, [(point.name, lambda x, hook: seen.update(read=point(x)))]):
            model(TOKENS)
    finally:
        handle.remove()
    torch.testing.assert_close(seen["read"], seen["true"], rtol=1e-5, atol=1e-5)  # one rounding of x * w


def test_hook_name_refuses_a_point_before_the_norm_weight(model: LensModel, surface: str) -> None:
    site = Site(1, "mlp_in")
    if surface == "bridge":
        assert hook_name(model, site) == "blocks.1.mlp.hook_in"
    else:
        with pytest.raises(UnknownHookError, match="before the norm's weight"):
            hook_name(model, site)
    assert hook_name(model, Site(2)) == "blocks.2.hook_resid_post"
    with pytest.raises(UnknownHookError):
        hook_name(model, Site(3))


def test_write_points_add_up_in_every_block(model: LensModel) -> None:
    names = write_points(model)
    assert len(names) == len(set(names)) == 2 * 3 + 1
    seen: dict[str, torch.Tensor] = {}
    reads = [*names, *(f"blocks.{i}.hook_resid_post" for i in range(3))]
    with torch.no_grad(), hooked(model, [(n, lambda x, hook, n=n: seen.update({n: x})) for n in reads]):
        model(TOKENS)
    stream = seen[names[0]]
    for i in range(3):
        stream = stream + seen[names[2 * i + 1]] + seen[names[2 * i + 2]]
        torch.testing.assert_close(stream, seen[f"blocks.{i}.hook_resid_post"], rtol=1e-4, atol=1e-4)


def test_where_the_sublayers_output_is_taken_before_a_post_norm_the_norms_output_is_the_write() -> None:
    """No architecture of TL 3.9 or 4.3 needs this any more: their aliases follow the post-norm. Older ones did."""
    tails = ("hook_attn_out", "ln1_post.hook_out", "hook_mlp_out", "ln2_post.hook_out", "hook_resid_pre")
    seen = {f"blocks.0.{tail}": torch.randn(1, 4, 8) for tail in tails}
    written = seen["blocks.0.ln1_post.hook_out"] + seen["blocks.0.ln2_post.hook_out"]
    seen["blocks.0.hook_resid_post"] = seen["blocks.0.hook_resid_pre"] + written
    assert residual_writes._additive(0, seen) == ("blocks.0.ln1_post.hook_out", "blocks.0.ln2_post.hook_out")
    seen["blocks.0.hook_resid_post"] = seen["blocks.0.hook_resid_pre"] + 2 * written
    with pytest.raises(NotAdditiveError, match="block 0"):
        residual_writes._additive(0, seen)


def test_a_state_space_may_stand_in_attentions_place_or_beside_it() -> None:
    tails = ("mixer.hook_out", "mamba.hook_out", "hook_attn_out", "hook_mlp_out", "hook_resid_pre")
    seen = {f"blocks.0.{tail}": torch.randn(1, 4, 8) for tail in tails}
    for parts in (("mixer.hook_out",), ("mixer.hook_out", "hook_mlp_out"), ("mamba.hook_out", *tails[2:4])):
        names = tuple(f"blocks.0.{tail}" for tail in parts)
        seen["blocks.0.hook_resid_post"] = sum((seen[n] for n in names), seen["blocks.0.hook_resid_pre"])
        assert residual_writes._additive(0, seen) == names
    seen["blocks.0.mixer.hook_out"] = torch.randn(4, 8)  # tokens flattened: not the stream's shape
    with pytest.raises(NotAdditiveError, match=r"mamba.hook_out \+ blocks.0.hook_mlp_out: off by"):
        seen["blocks.0.hook_resid_post"] = torch.randn(1, 4, 8)
        residual_writes._additive(0, seen)


def test_points_that_never_fire_are_no_writes() -> None:
    tails = ("hook_attn_out", "hook_mlp_out", "hook_resid_pre")
    with pytest.raises(NotAdditiveError, match="around block 0 never fire"):
        residual_writes._additive(0, {f"blocks.0.{tail}": torch.randn(1, 4, 8) for tail in tails})


def test_write_points_are_found_under_an_intervention(surface: str) -> None:
    model = load_model(make_hf_model("gpt2"), surface=surface, tokenizer=make_tokenizer())
    with hooked(model, [(f"blocks.1.{s}", double) for s in ("hook_attn_out", "hook_mlp_out", "hook_resid_post")]):
        model(TOKENS)
        assert len(write_points(model)) == 7


def test_blocks_that_do_not_add_up_are_refused(surface: str) -> None:
    model = load_model(make_hf_model("llama"), surface=surface, tokenizer=make_tokenizer())
    block = model.blocks[1]  # type: ignore[attr-defined]
    handle = block.register_forward_pre_hook(lambda m, args: (args[0] * 1, *args[1:]))
    end = hook_points(model)["blocks.1.hook_resid_post"]
    scale = end.register_forward_pre_hook(lambda m, args: (1.5 * args[0],), prepend=True)
    try:
        with pytest.raises(NotAdditiveError, match="block 1"):
            write_points(model)
    finally:
        handle.remove()
        scale.remove()


# --- Traps that are there for a reason --------------------------------------------------------------------------------


def test_resid_mid_is_not_writable_because_a_bridge_edits_only_the_mlps_input(
    make_model: Callable[..., LensModel],
) -> None:
    assert not Site(1, "resid_mid").writable and not Site(1, "mlp_in").writable
    model = make_model("gpt2", "bridge")

    def change(name: str) -> torch.Tensor:
        seen = {}
        with hooked(
            model, [(name, lambda x, hook: x + 1), ("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]
        ):
            with hooked(model, [("blocks.1.hook_resid_post", lambda x, hook: seen.update(x=x))]):
                model(TOKENS)
        return seen["x"]

    assert not torch.allclose(change("blocks.1.hook_resid_pre"), change("blocks.2.hook_resid_pre"), atol=1e-3)
    assert torch.equal(change("blocks.1.hook_resid_mid"), change("blocks.2.hook_resid_pre"))


if find_spec("sae_lens"):

    def test_an_attached_sae_is_named_and_its_detachment_noticed() -> None:
        plain = load_model(make_hf_model("gpt2"), surface="hooked", tokenizer=make_tokenizer())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from sae_lens import SAE, HookedSAETransformer, StandardSAEConfig

            model = HookedSAETransformer(plain.cfg)
        cfg = StandardSAEConfig(d_in=32, d_sae=64, device="cpu")
        cfg.metadata.hook_name = RESID
        sae = SAE.from_dict(cfg.to_dict())
        with hooked(model, [(RESID, nothing)]):
            model(TOKENS)
        model.add_sae(sae)
        with pytest.raises(UnknownHookError, match="stands in its place"), hooked(model, [(RESID, nothing)]):
            model(TOKENS)
        model.reset_saes()
        fired = []
        with hooked(model, [(RESID, lambda x, hook: fired.append(1))]):
            model(TOKENS)
        assert fired == [1]
