"""Every setting of a run, once: its name, its default, what is allowed, and its meaning. --help shows them all."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxsft import allowed
from jaxsft.allowed import ANY, Allowed, above, at_least, from_to, from_to_below, name_of, names_of, none_or, one_of
from jaxsft.models.families import ARCHITECTURES
from jaxsft.models.family import PARAMETER_KINDS


class Key(NamedTuple):
    """A setting. The type of `default` is that of its values; where it is None, they are None or of type `kind`."""

    name: str
    default: Any
    allowed: Allowed
    meaning: str
    kind: type = int


def architectures() -> tuple[str, ...]:
    """What model.arch may be."""
    return tuple(ARCHITECTURES)


def augmentations() -> tuple[str, ...]:
    """What data.augment may hold."""
    from jaxsft.data.augment import AUGMENTATIONS  # here, for it brings Orbax, which takes a second to import

    return AUGMENTATIONS


def parameter_kinds() -> tuple[str, ...]:
    """What optim.no_decay may hold."""
    return tuple(dict.fromkeys(PARAMETER_KINDS.values()))


# The defaults are torch's where torch has one, else what a careful fine-tuning run would use. The meaning names a
# choice only to say what it does, for --help shows what is allowed beside it.
KEYS = (
    Key("seed", 0, allowed.SEED,
        "of new weights, the order of the data, augmentation and dividing; all else is determined by it"),

    Key("model.arch", "resnet18", name_of(architectures),
        "as torchvision calls it, or resnet10_w16, a small one for 64 px"),
    Key("model.weights", "IMAGENET1K_V1", ANY,
        "'' = from scratch | 'sample' | a torchvision name (IMAGENET1K_V1) | a file of PyTorch's or .safetensors |"
        " a ported directory | the workdir of a run"),
    Key("model.checkpoint", "last", allowed.CHECKPOINT, "of a run that is given as weights"),
    Key("model.num_classes", None, none_or(at_least(1)), "None: as many as the data has"),
    Key("model.classes", (), allowed.CLASSES,
        "names of the outputs in their order, to change the head of weights whose classes have names: one that they"
        " know keeps its row, 'old=new' renames it, any other is new, and what is not named goes; (): as model.head"
        " says"),
    Key("model.head", "auto", one_of("auto", "keep", "replace"),
        "of the weights; 'auto': kept where its class names are the data's, else replaced by a fresh one"),
    Key("model.head_init", "torch", one_of("torch", "zeros"), "of a fresh head; 'torch': U(+-1/sqrt(fan_in))"),
    Key("model.freeze", (), allowed.PATTERNS,
        "searched in parameter paths such as 'layer1_0/conv1/kernel'; a parameter where one is found is not trained"),
    Key("model.unfreeze", (), allowed.EPOCHS,
        "when what model.freeze covers begins to train; the first whose regular expression is found in a parameter's"
        " path counts; until then, and without one, it is frozen"),
    Key("model.dropout", None, none_or(from_to_below(0, 1)),
        "rate in training, of the networks that have it; None: torchvision's own", float),
    Key("model.stochastic_depth", None, none_or(from_to_below(0, 1)),
        "rate of the deepest block in training, of the networks that have it; None: torchvision's own", float),
    Key("model.batch_norm", "train", one_of("train", "frozen"),
        "'frozen': running statistics everywhere; frozen layers always use them"),

    Key("data.source", "tfds:cifar10", allowed.SOURCE, "of the images; a registered one too"),
    Key("data.data_dir", "", ANY, "of TFDS; '' = its own default"),
    Key("data.train_split", "train", allowed.SPLIT, "what is trained on"),
    Key("data.eval_split", "", ANY, "'' = the first of validation, val, valid and test that the data has"),
    Key("data.eval_fraction", 0.1, above(0, below=1),
        "of each class, to evaluate on where the files have no split of their own; of several labels an image counts"
        " as of its rarest"),
    Key("data.fraction", 1.0, above(0, at_most=1), "of each class to train on, for low-data work"),
    Key("data.per_class", None, none_or(at_least(1)),
        "not None: instead of fraction, so many training images of each class"),
    Key("data.class_order", "text", one_of("text", "numeric"),
        "of folders and lists; 'text' as torchvision's ImageFolder (10 before 2)"),
    Key("data.label_delimiter", "", allowed.DELIMITER,
        "of csv: between the labels of an image that has any number of them, such as ';'; '': it has one"),
    Key("data.on_error", "raise", one_of("raise", "skip"), "at a broken image; 'skip' lists it in bad_files.txt"),
    Key("data.exif_orientation", True, ANY,
        "turn pictures upright as their EXIF tag says; torchvision's ImageFolder does not"),
    Key("data.check_overlap", False, ANY,
        "warn of images that are both trained and evaluated on; decodes all of them"),
    Key("data.resident_mb", 1024, at_least(0),
        "sets of one image size lie on the device as one array up to this; others are streamed"),
    Key("data.cache", "", ANY,
        "a folder, also in a bucket, that keeps what streamed images are decoded and resized to, for the next passes"
        " and runs; '' = none"),
    Key("data.workers", None, none_or(from_to(0, 256)),
        "processes that decode streamed images; None: one a core, at most 16; 0: none"),
    Key("data.image_size", 224, from_to(32, allowed.LARGEST), "px, the side of the square the model sees"),
    Key("data.resize_size", None, allowed.RESIZE,
        "px, the short side before the middle is cut out; None: image_size"),
    Key("data.interpolation", "bilinear", one_of("bilinear", "bicubic"),
        "of resizing, antialiased; with preset 'weights' theirs"),
    Key("data.unlabelled", "", allowed.SOURCE_OR_NONE,
        "images without labels, or whose labels are not looked at, to learn from by FixMatch (arXiv:2001.07685); a"
        " folder may hold them without folders of classes"),
    Key("data.unlabelled_split", "train", allowed.SPLIT, "of data.unlabelled"),
    Key("data.unlabelled_ratio", 7, at_least(1), "unlabelled images in a batch for each labelled one"),
    Key("data.batch_size", 128, at_least(1), "global: over all devices of all processes"),
    Key("data.last_batch", "drop", one_of("drop", "keep"),
        "what to do with the last, partial batch of an epoch; 'keep': train on it as it is"),
    Key("data.sampling", "shuffle", one_of("shuffle", "balanced"), "'balanced': every class equally often"),
    Key("data.augment", ("pad_crop", "flip"), names_of(augmentations), "what changes training images, in this order"),
    Key("data.crop_scale", (0.08, 1.0), allowed.SHARES, "of random_resized_crop: how much it keeps, from and to"),
    Key("data.crop_ratio", (3 / 4, 4 / 3), allowed.RATIOS, "of random_resized_crop: width / height, from and to"),
    Key("data.jitter", (0.4, 0.4, 0.4, 0.1), allowed.JITTER,
        "of color_jitter: brightness, contrast, saturation, hue"),
    Key("data.rand_augment", (2, 9), allowed.RAND_AUGMENT, "of rand_augment: torchvision's num_ops and magnitude"),
    Key("data.erasing", 0.5, from_to(0, 1), "of random_erasing: probability"),
    Key("data.preset", "config", one_of("config", "weights"),
        "whose preprocessing; 'config': resize_size, interpolation, mean and std as given here; 'weights': those of the"
        " weights' model.json (256 or 232 px for 224)"),
    Key("data.mean", (0.485, 0.456, 0.406), allowed.RGB, "of red, green and blue in 0..1, subtracted"),
    Key("data.std", (0.229, 0.224, 0.225), allowed.RGB_ABOVE_0, "of red, green and blue in 0..1, divided by"),

    Key("optim.name", "sgd", one_of("sgd", "adamw", "lamb", "lars", "lion", "muon"),
        "the optimizer, as torch.optim has it where it does; lamb and lars adapt weights alone, not norms and biases;"
        " muon is for weights but the head's, with adamw for the rest, at a rate of adamw's size"),
    Key("optim.lr", 0.01, above(0),
        "learning rate: the peak, after the warm-up and before the schedule lowers it"),
    Key("optim.lr_scaling", "none", one_of("none", "linear", "sqrt"),
        "not 'none': optim.lr is for 256 images, and the peak is lr x batch_size/256, or lr x its square root"),
    Key("optim.momentum", 0.9, from_to_below(0, 1),
        "of sgd, lars and muon: how much of the last update goes on; muon's authors take 0.95, with nesterov"),
    Key("optim.nesterov", False, ANY, "of sgd, lars and muon: Nesterov's momentum"),
    Key("optim.betas", (), allowed.BETAS,
        "of adamw, lamb, lion and muon's adamw: how much of both moments goes on; (): 0.9,0.999, lion's 0.9,0.99"),
    Key("optim.eps", None, none_or(above(0)),
        "of adamw, lamb and muon's adamw: added to the root of the second moment; None: 1e-8, lamb's 1e-6", float),
    Key("optim.trust_coefficient", 0.001, above(0), "of lars: the rate of a weight by its norm over its gradient's"),
    Key("optim.weight_decay", 0.0, at_least(0),
        "coupled for sgd and lars (torch: added to the gradient), decoupled for the others"),
    Key("optim.decay_norm_and_bias", True, ANY,
        "whether norms and biases decay too, as torch lets every parameter; False is short for norm and bias in"
        " no_decay"),
    Key("optim.no_decay", (), names_of(parameter_kinds),
        "kinds of parameters that weight decay leaves alone; torchvision's references: --norm-weight-decay=0 is norm,"
        " --bias-weight-decay=0 bias, --transformer-embedding-decay=0 class_token,position_embedding,bias_table"),
    Key("optim.l2_sp", 0.0, at_least(0),
        "alpha of L2-SP, 0 = off: what came from model.weights decays by it towards where it started, instead of by"
        " weight_decay towards 0; a fresh head has weight_decay"),
    Key("optim.schedule", "cosine", one_of("constant", "cosine", "linear", "step", "polynomial", "onecycle"),
        "of the rate after the warm-up; 'cosine', 'linear' and 'polynomial' end at 0; 'onecycle' is torch's OneCycleLR"
        " with its own warm-up, and does not cycle the momentum"),
    Key("optim.schedule_by", "step", one_of("step", "epoch"),
        "'epoch': the rate changes only between epochs, as torchvision's references have it"),
    Key("optim.warmup_epochs", 0.0, at_least(0), "over which the rate rises from 0 in a straight line"),
    Key("optim.warmup_steps", None, none_or(at_least(0)), "not None: instead of warmup_epochs, so many updates"),
    Key("optim.step_epochs", 30.0, above(0),
        "of the schedule 'step': multiply by step_factor every so many epochs"),
    Key("optim.step_factor", 0.1, above(0), "of the schedule 'step'"),
    Key("optim.power", 1.0, above(0), "of the schedule 'polynomial': of the share of the run that is still to come"),
    Key("optim.onecycle_warmup", 0.3, above(0, below=1),
        "of the schedule 'onecycle': the share of the run in which the rate rises, from 1/25 of the peak"),
    Key("optim.layer_decay", 1.0, above(0, at_most=1),
        "every stage nearer the image has its rate multiplied by this once more"),
    Key("optim.lr_multipliers", (), allowed.MULTIPLIERS,
        "of the rate; the first whose regular expression is found in a parameter's path counts"),
    Key("optim.sam", 0.0, at_least(0),
        "rho of sharpness-aware minimisation (arXiv:2010.01412), 0 = off: two gradients an update"),
    Key("optim.clip_norm", 0.0, at_least(0),
        "0 = off; torch.nn.utils.clip_grad_norm_ before weight decay, over all that trains"),
    Key("optim.accumulate", 1, at_least(1), "micro-batches an update: as many examples, less memory"),

    Key("train.method", "full", one_of("full", "probe", "lp-ft"),
        "'probe': only the head trains, a linear probe; 'lp-ft': first a probe, then everything (arXiv:2202.10054)"),
    Key("train.keep_features", True, ANY,
        "of 'probe': compute once what comes into the head, of images as they are evaluated, not augmented; False: at"
        " each step through the network"),
    Key("train.probe_epochs", 20.0, above(0), "of 'lp-ft': passes over the training images with the head alone"),
    Key("train.probe_lr", 0.1, above(0),
        "of 'lp-ft': learning rate meanwhile, of SGD with momentum 0.9; it falls to 0 as a cosine"),
    Key("train.epochs", 10.0, above(0), "passes over the training images; fractions too"),
    Key("train.steps", None, none_or(at_least(1)), "not None: instead of epochs, so many updates"),
    Key("train.loss", "cross_entropy", one_of("cross_entropy", "bce", "focal"),
        "that is minimised; of images with several labels 'bce', torch.nn.BCEWithLogitsLoss, or 'focal'"),
    Key("train.focal_gamma", 2.0, at_least(0),
        "of the loss 'focal': how much what is already right counts less (arXiv:1708.02002)"),
    Key("train.label_smoothing", 0.0, from_to_below(0, 1), "share of each label that is spread over all classes"),
    Key("train.class_weights", (), allowed.CLASS_WEIGHTS,
        "a factor on the loss of each class, as torch.nn.CrossEntropyLoss(weight=...); 'balanced': in inverse"
        " proportion to how often it comes; (): none"),
    Key("train.mixup", 0.0, at_least(0),
        "alpha of mixup, 0 = off; with cutmix too a coin decides at each step"),
    Key("train.cutmix", 0.0, at_least(0), "alpha of cutmix, 0 = off"),
    Key("train.ema", 0.0, from_to_below(0, 1),
        "decay of the moving average of parameters and batch statistics that is evaluated and kept; 0 = off"),
    Key("train.ema_warmup", False, ANY, "let that decay begin at 0.1 and rise, (1 + t) / (10 + t) of update t"),
    Key("train.swa_epochs", 0, at_least(0),
        "mean of the parameters at the ends of the last so many epochs (SWA, arXiv:1803.05407), evaluated and kept with"
        " batch statistics estimated anew; 0 = off"),
    Key("train.teacher", "", ANY,
        "the workdir of a finished run that teaches this one (distillation, arXiv:1503.02531); '' = none"),
    Key("train.distill_weight", 0.5, from_to(0, 1), "share of the teacher's answers in the loss, beside the labels"),
    Key("train.temperature", 2.0, above(0), "of distillation: both networks' logits are divided by it"),
    Key("train.fixmatch_threshold", 0.95, from_to(0, 1),
        "how sure of an unlabelled image the network must be to learn from it"),
    Key("train.fixmatch_weight", 1.0, at_least(0), "of the loss of unlabelled images"),
    Key("train.precision", "float32", one_of("float32", "bfloat16", "float16", "auto"),
        "of activations; parameters and sums stay float32; 'float16', for GPUs before Ampere, scales the loss"
        " dynamically; 'auto': bfloat16 on TPUs and on GPUs that have it, else float32"),
    Key("train.matmul_precision", "default", one_of("default", "high", "highest"),
        "of products of float32; 'default': JAX's own, one pass of bfloat16 on a TPU, TF32 on a GPU; 'high': three"
        " passes; 'highest': in full; a CPU has only that"),
    Key("train.remat", False, ANY,
        "keep less for the backward pass and compute it again: a larger batch fits, a step is slower"),
    Key("train.steps_per_call", 1, from_to(1, 1000),
        "updates that the device makes at one call of the host, where a step takes milliseconds"),
    Key("train.log_every_steps", 50, at_least(1), "updates that a line of metrics.jsonl is about"),
    Key("train.on_nan", "stop", one_of("stop", "ignore"), "at a loss or parameter that is NaN or infinite"),
    Key("train.on_changed_data", "stop", one_of("stop", "continue"),
        "where a resumed run finds other classes, images or order"),

    Key("eval.every_epochs", 1.0, above(0),
        "epochs between evaluations; the last update is followed by one in any case"),

    Key("checkpoint.every_steps", 500, at_least(1),
        "updates between checkpoints; the last update is followed by one in any case"),
    Key("checkpoint.keep", 2, at_least(1), "how many stay, the newest; the best by best_metric besides"),
    Key("checkpoint.best_metric", "", one_of("", "accuracy", "top5", "loss", "map", "f1_micro", "f1_macro"),
        "of an evaluation, by which the best checkpoint is kept too; the last three of images with several labels;"
        " '' = off"),

    Key("parallel.backend", "pmap", one_of("pmap", "shard_map"), "what of JAX's spreads a step over the devices"),
    Key("parallel.batch_norm", "local", one_of("local", "sync"),
        "'local': each device its own statistics, a CPU being one; 'sync': over all devices"),
    Key("parallel.timeout_seconds", 300, at_least(1), "how long the processes of a run wait for each other"),
)  # fmt: skip
