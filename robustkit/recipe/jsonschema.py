"""The JSON schema of recipes, made from the plugins that are there."""

from __future__ import annotations

from typing import Any

from robustkit import registry
from robustkit.recipe.spec import RUNTIMES

NUMBER = {"type": ["number", "string"]}


def recipe_schema() -> dict[str, Any]:
    """Return a JSON schema (draft 2020-12) with every plugin and its parameters."""
    train = _object(
        {
            "epochs": {"type": "integer", "minimum": 1},
            "batch_size": {"type": "integer", "minimum": 1},
            "validation": NUMBER,
            "select": {"enum": ["auto", "clean", "robust", "last"]},
            "precision": {"enum": ["auto", "fp32", "bf16"]},
            "compile": {"type": "boolean"},
            "memory_limit": {"type": "integer"},
            "guards": {"type": "boolean"},
            "time_limit": NUMBER,
            "monitor_test": {"type": "boolean"},
            "stages": {"anyOf": [{"type": "array", "minItems": 1, "items": _stage()}, {"type": "null"}]},
            "optimizer": _use("optimizer"),
            "schedule": _use("schedule"),
            "augment": {"type": "array", "items": _use("augmentation")},
        }
    )
    threat = _object({"norm": {"enum": ["linf", "l2", "l1", "l0"]}, "eps": NUMBER})
    variant = _object(
        {
            "matrix": {"type": "object"},
            "from": {"type": "string"},
            "teacher": {"type": "string"},
            "model": _use("model"),
            "threat": threat,
            "defenses": {"type": "array", "items": _use("defense")},
            "compress": {"type": "array", "items": _use("compressor")},
            "train": {"anyOf": [train, {"type": "null"}]},
        }
    )
    evaluate = _object(
        {
            "examples": {"type": "integer", "minimum": 1},
            "batch_size": {"type": "integer", "minimum": 1},
            "attacks": {"type": "array", "items": _use("attack")},
            "eps_curve": {"type": "array", "items": NUMBER},
            "latency": {
                "anyOf": [
                    {"type": "boolean"},
                    {"enum": ["full", *RUNTIMES]},
                    {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"enum": list(RUNTIMES)}},
                ]
            },
            "gallery": {"type": "integer", "minimum": 0, "maximum": 64},
            "certify": {"anyOf": [_use("certificate"), {"type": "array", "items": _use("certificate")}]},
            "corruptions": {"type": "boolean"},
            "audit": {"type": "integer", "minimum": 0},
            "quantize_input": {"type": "boolean"},
            "precision": {"enum": ["auto", "fp32", "bf16"]},
            "compile": {"type": "boolean"},
        }
    )
    switches = {name: {"type": "boolean"} for name in ("confident", "every_seed")}
    gate = {"anyOf": [{"type": "string"}, _object({"gate": {"type": "string"}, **switches})]}
    whole = _object(
        {
            "name": {"type": "string"},
            "seed": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
            "device": {"type": "string"},
            "data": _data(),
            "model": _use("model"),
            "threat": threat,
            "normalize": _object({"mean": {"type": "array"}, "std": {"type": "array"}}),
            "train": train,
            "variants": {"type": "object", "additionalProperties": {"anyOf": [variant, {"type": "null"}]}},
            "evaluate": evaluate,
            "gates": {"type": "array", "items": gate},
            "plugins": {"type": "array", "items": {"type": "string"}},
        }
    )
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "robustkit recipe"}
    return {**head, **whole, "required": ["data", "model", "variants"]}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _stage() -> dict[str, Any]:
    count = {"type": "integer", "minimum": 1}
    names = {"type": "array", "items": {"type": "string"}}
    stage = {"epochs": count, "lr": NUMBER, "eps": NUMBER, "resolution": count, "batch_size": count, "freeze": names}
    return {**_object(stage), "required": ["epochs"]}


def _use(kind: registry.Kind) -> dict[str, Any]:
    known = {
        name: {"anyOf": [_parameters(registry.find(kind, name)), {"type": "null"}]} for name in registry.names(kind)
    }
    written = {"type": "object", "properties": known, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"type": "string"}, written]}


def _data() -> dict[str, Any]:
    """Return what `data:` holds: a source, and beside it what is planted in its training images."""
    text, written = _use("data")["anyOf"]
    properties = {**written["properties"], "poison": _use("poison")}
    return {"anyOf": [text, {**written, "properties": properties, "maxProperties": 2}]}


def _parameters(entry: registry.Entry) -> dict[str, Any]:
    properties: dict[str, Any] = {"as": {"type": "string"}}
    required = []
    for parameter in registry.parameters(entry):
        properties[parameter.name] = {"description": parameter.annotation}
        if parameter.required:
            required.append(parameter.name)
        elif isinstance(parameter.default, str | int | float | bool):
            properties[parameter.name]["default"] = parameter.default
    return {**_object(properties), "required": required}
