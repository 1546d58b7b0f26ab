"""The kinds of plugins, and where each built-in one lives."""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "data", "model", "defense", "compressor", "attack", "certificate", "optimizer", "schedule", "augmentation"
]
KINDS: tuple[Kind, ...] = (
    "data",
    "model",
    "defense",
    "compressor",
    "attack",
    "certificate",
    "optimizer",
    "schedule",
    "augmentation",
)

BUILTIN: dict[Kind, dict[str, str]] = {
    "data": {
        "digits": "robustkit.data.sources.digits:Digits",
        "fashion_mnist": "robustkit.data.sources.idx:FashionMnist",
        "mnist": "robustkit.data.sources.idx:Mnist",
        "cifar10": "robustkit.data.sources.vision:Cifar10",
        "cifar100": "robustkit.data.sources.vision:Cifar100",
        "svhn": "robustkit.data.sources.vision:Svhn",
        "image_folder": "robustkit.data.sources.folder:ImageFolder",
        "npz": "robustkit.data.sources.npz:Npz",
    },
    "model": {
        "baseline_cnn": "robustkit.models.baseline_cnn:BaselineCnn",
        "small_cnn": "robustkit.models.small_cnn:SmallCnn",
        "resnet18": "robustkit.models.resnet:resnet18",
        "wide_resnet": "robustkit.models.wide_resnet:WideResNet",
    },
    "defense": {
        "weight_decay": "robustkit.defenses.regularization:WeightDecay",
        "l1": "robustkit.defenses.regularization:L1",
        "label_smoothing": "robustkit.defenses.regularization:LabelSmoothing",
        "dropout": "robustkit.defenses.dropout:Dropout",
        "balanced_sampling": "robustkit.defenses.sampling:BalancedSampling",
        "deduplicate": "robustkit.defenses.sampling:Deduplicate",
        "knn_filter": "robustkit.defenses.sampling:KnnFilter",
        "pgd_training": "robustkit.defenses.adversarial:PgdTraining",
        "n_fgsm": "robustkit.defenses.adversarial:NFgsm",
        "trades": "robustkit.defenses.adversarial:Trades",
        "jpeg": "robustkit.defenses.inference:Jpeg",
        "bit_depth": "robustkit.defenses.inference:BitDepth",
        "median_filter": "robustkit.defenses.inference:MedianFilter",
        "randomized_smoothing": "robustkit.defenses.sampled:RandomizedSmoothing",
        "mc_dropout": "robustkit.defenses.sampled:McDropout",
    },
    "compressor": {
        "global_l1": "robustkit.compress.prune:GlobalL1",
        "layer_l1": "robustkit.compress.prune:LayerL1",
        "random": "robustkit.compress.prune:RandomWeights",
        "channel_l2": "robustkit.compress.channels:ChannelL2",
    },
    "attack": {
        "noise": "robustkit.attacks.noise:Noise",
        "fgsm": "robustkit.attacks.gradient:Fgsm",
        "pgd": "robustkit.attacks.gradient:Pgd",
        "apgd": "robustkit.attacks.apgd:Apgd",
        "square": "robustkit.attacks.square:Square",
        "cascade": "robustkit.attacks.cascade:Cascade",
        "autoattack": "robustkit.attacks.autoattack:AutoAttack",
        "fmn": "robustkit.attacks.minimum_norm.fmn:Fmn",
        "ddn": "robustkit.attacks.minimum_norm.ddn:Ddn",
        "pdpgd": "robustkit.attacks.minimum_norm.pdpgd:Pdpgd",
        "sigma_zero": "robustkit.attacks.minimum_norm.sigma_zero:SigmaZero",
    },
    "certificate": {
        "interval": "robustkit.certificates.interval:Interval",
        "randomized_smoothing": "robustkit.certificates.smoothing:RandomizedSmoothing",
    },
    "optimizer": {
        "sgd": "robustkit.train.optim:Sgd",
        "adam": "robustkit.train.optim:Adam",
        "adamw": "robustkit.train.optim:AdamW",
    },
    "schedule": {
        "one_cycle": "robustkit.train.optim:OneCycle",
        "cosine": "robustkit.train.optim:Cosine",
        "step": "robustkit.train.optim:StepDecay",
        "constant": "robustkit.train.optim:Constant",
    },
    "augmentation": {
        "crop": "robustkit.data.augment:Crop",
        "flip": "robustkit.data.augment:Flip",
        "cutout": "robustkit.data.augment:Cutout",
    },
}

ENTRY_POINTS: dict[Kind, str] = {
    "data": "robustkit.data",
    "model": "robustkit.models",
    "defense": "robustkit.defenses",
    "compressor": "robustkit.compressors",
    "attack": "robustkit.attacks",
    "certificate": "robustkit.certificates",
}
