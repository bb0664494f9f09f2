"""The grammar of specs."""

from typing import Literal

import pytest

import commopt
from commopt.spec import Table

ALL = ["bf16", "fp16", "int4", "int8", "none", "randomk", "topk"]
SPECS = [
    *ALL, "int8:block=64", "int8:rounding=stochastic", "int8:ef=true", "int4:block=1024,rounding=stochastic,ef=false",
    "topk:ratio=0.001", "topk:ratio=1e-06", "topk:ratio=1.0,values=bf16,warmup=200,ef=false", "bf16:ef=true", "fp16:ef=true",
    "topk:scope=block", "topk:ratio=0.1,scope=block,values=int4", "randomk:ratio=0.001,ef=false",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_what_its_compressor_prints(spec):
    compressor = commopt.parse(spec)
    assert str(compressor) == spec and commopt.parse(str(compressor)) == compressor
    assert commopt.parse(compressor) is compressor
    assert hash(compressor) == hash(commopt.parse(spec))
    with pytest.raises(AttributeError):
        compressor.ef = True  # frozen


def test_the_shortest_spec_is_printed():
    assert str(commopt.parse(" int8:block=256, rounding = nearest ")) == "int8"
    assert str(commopt.parse("topk:values=int8,ratio=0.01,ef=TRUE")) == "topk:values=int8"
    assert commopt.parse("int4:block=128") == commopt.parse("int4")
    assert commopt.parse("int4") != commopt.parse("int8")


@pytest.mark.parametrize("name", ALL)
def test_every_lossy_compressor_has_error_feedback_on_where_it_is_needed(name):
    takes = commopt.compressors()[name]
    if name == "none":
        assert takes == {}
    else:
        assert takes["ef"] == (bool, name in ("int4", "topk", "randomk"))


@pytest.mark.parametrize("spec, words", [
    ("int9", ["unknown compressor 'int9'", *ALL]),
    ("", ["unknown compressor ''"]),
    ("int8:", ["''", "block=256 (int)"]),
    ("int8:blok=64", ["'blok=64'", "block=256 (int)", "rounding=nearest (nearest | stochastic)", "ef=false (bool)"]),
    ("int8:block", ["'block'", "key=value"]),
    ("int8:block=six", ["block must be int, got 'six'"]),
    ("int8:block=64,block=128", ["block is given twice"]),
    ("int8:rounding=up", ["rounding must be nearest | stochastic, got 'up'"]),
    ("int8:ef=1", ["ef must be true or false, got '1'"]),
    ("int8:block=12", ["block must be a multiple of 8"]),
    ("topk:ratio=0", ["ratio must be above 0 and at most 1"]),
    ("topk:ratio=nan", ["ratio must be above 0"]),
    ("topk:warmup=-1", ["warmup must be a number of steps"]),
    ("topk:momentum=1", ["momentum must be at least 0 and below 1"]),
    ("topk:momentum=0.9,ef=false", ["needs ef=true"]),
    ("none:ef=true", ["it takes none"]),
    ("topk:scope=layer", ["scope must be global | threshold | block, got 'layer'"]),
    ("randomk:ratio=2", ["ratio must be from 1e-6 to 1, got 2.0"]),
    (None, ["must be a spec like", "got None"]),
    (8, ["got 8"]),
])
def test_a_bad_spec_names_the_good_ones(spec, words):
    with pytest.raises(ValueError) as error:
        commopt.parse(spec)
    assert all(word in str(error.value) for word in words), error.value


def test_registering():
    table = Table("fruit")

    @table.register("apple")
    class Apple:
        """Green."""

        size: int = 3
        kind: Literal["sweet", "sour"] = "sweet"

    assert str(table.parse("apple:size=4")) == "apple:size=4" and table.parse("apple").kind == "sweet"
    with pytest.raises(ValueError, match="'apple' is already registered, by .*Apple"):
        table.register("apple")(type("Other", (), {}))
    for bad in ("a:b", "a,b", "a=b", "a b", ""):
        with pytest.raises(ValueError, match="a fruit's name must be a word"):
            table.register(bad)
    with pytest.raises(ValueError, match="unknown fruit 'pear' in 'pear'; known are apple"):
        table.parse("pear")
