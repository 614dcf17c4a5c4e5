"""The few-shot classifier as scikit-learn has them: fit, predict, predict_proba, score.

What it computes is in `task`; this module turns what people have (folders, pictures, arrays, labels of any
kind) into tensors and back. Constructing one stores parameters and reads nothing.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor

from amt.attacks.kinds import parse_attack
from amt.few_shot import hub, pictures, task_file
from amt.few_shot.card import card
from amt.few_shot.fitting import fit_pictures, fit_texts
from amt.few_shot.pools import find_pool, local_pool, open_pool
from amt.few_shot.task import Merging, Task, logits_of, standing
from amt.files import export, text_prototypes
from amt.models.head_settings import Head, parse_head
from amt.models.network import CHUNK, find_device
from amt.models.trim import Trim
from amt.models.weights import Coefficients
from amt.tasks.settings import Routing
from meta_dataset_readers.errors import InputError


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of images, fitted to a few labelled examples by merging a pool of adversarial LoRAs.

    Fitting trains nothing: the adapters are scored on the labelled images, the best are merged, and the mean
    features of each class classify by cosine (AMT, section 3.4), as test_meta_dataset.py does it. A pool's
    file may recommend other shares of the adapters and another head, see `OpenPool`.

    Images are a folder of image files, paths, PIL pictures, uint8 arrays (N, H, W, 3), or floating-point
    arrays or tensors in [0, 1], of any size: the shorter side is resized to 256/224 of the network's image
    size and the centre is taken. Floating-point images of the network's own size are taken as they are.

    Args:
        pool: a pool in the box by its name, a file, or the folder of a training; see `from_pretrained`.
        beta, gamma, top_k, route_epsilon, augment_probability: of the router, see `Routing`; route_epsilon is
            in 1/255 of the pixel range.
        coefficients: instead of the router, one share per adapter, of sum 1; None: those that the pool's file
            recommends, unless a setting of the router is not the default; "route": the router's.
        trims: trimmings of the merged weights, see `Trim`.
        head: what classifies the features: "prototypes", "centred", "lda", "ridge", "robust-lda", "text"
            or "mix", also with options, "robust-lda support=0.3 attack=0.3"; or a `Head`; None: what the
            pool's file recommends, see `OpenPool.head`. robust-lda needs statistics, which
            `amt pool --statistics` adds.
        pretrained_checkpoint: the weights that the pool was trained from, which only "mix" reads; None: those
            in the box, or of timm's hub.
        weights_key: which network to take of a pretrained_checkpoint that holds several, such as "student".
        text_prototypes: a file .npz of the classes' texts, which head "text" classifies by, and the default
            then, "mix of=prototypes share=support other=text", mixes in; see `fit`.
        seed: decides everything random.
        image_size: side in pixels; None for the network's own.
        arch: the backbone, where the pool's file does not name it.
        device: "cpu", "cuda", "cuda:1", or "auto": a CUDA device if there is one.

    Attributes:
        classes_: (N,) the labels, sorted.
        coefficients_: (P,) float64, the share of each adapter.
        task_: what was fitted, a `Task`.

    >>> import amt
    >>> clf = amt.FewShotClassifier.from_pretrained("vit_mini_pool")
    >>> clf.fit("photos/support").classes_
    array(['cat', 'dog'], dtype='<U3')
    >>> clf.predict(["photos/new/1.png", "photos/new/2.png"]).shape
    (2,)
    """

    classes_: np.ndarray
    coefficients_: np.ndarray
    task_: Task

    def __init__(
        self,
        pool: str | os.PathLike = "vit_mini_pool",
        *,
        beta: float = Routing.beta,
        gamma: float = Routing.gamma,
        top_k: int = Routing.top_k,
        route_epsilon: float = Routing.epsilon,
        augment_probability: float = Routing.augment_probability,
        coefficients: Coefficients | str | None = None,
        trims: Sequence[Trim] = (),
        head: str | Head | None = None,
        pretrained_checkpoint: str | os.PathLike | None = None,
        weights_key: str | None = None,
        text_prototypes: str | os.PathLike | None = None,
        seed: int = 0,
        image_size: int | None = None,
        arch: str | None = None,
        device: str = "auto",
    ):
        self.pool = pool
        self.beta = beta
        self.gamma = gamma
        self.top_k = top_k
        self.route_epsilon = route_epsilon
        self.augment_probability = augment_probability
        self.coefficients = coefficients
        self.trims = trims
        self.head = head
        self.pretrained_checkpoint = pretrained_checkpoint
        self.weights_key = weights_key
        self.text_prototypes = text_prototypes
        self.seed = seed
        self.image_size = image_size
        self.arch = arch
        self.device = device

    @classmethod
    def from_pretrained(
        cls,
        pool: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **parameters: Any,
    ) -> Self:
        """A classifier of a pool that is there, not yet fitted; or a fitted one, if that was saved.

        Args:
            pool: the name of a pool in the box, a file, a folder with best.safetensors, last.safetensors or a
                single .safetensors, or the name ORG/NAME of a repository on Hugging Face's hub.
            revision, token, cache_dir, force_download, local_files_only: of the hub, as its mixins have them.
            parameters: as of the constructor, over those that `save_pretrained` wrote.

        Raises:
            InputError: there is no such pool, its file is no pool, or the hub cannot be reached.

        >>> FewShotClassifier.from_pretrained("vit_mini_pool", top_k=1).top_k
        1
        """
        here = local_pool(pool)
        file = here or find_pool(
            pool,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        if task_file.is_task(file):
            if unknown := parameters.keys() - {"device"}:
                raise InputError(f"{file}: is a fitted classifier, which takes no {min(unknown)}")
            return cls.load(file, **parameters)
        found = cls(file if here is None else pool, **(hub.parameters_beside(file) | parameters))
        open_pool(file, found.arch, found.image_size)
        return found

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write a folder that `from_pretrained` reads: config.json, model.safetensors and, if there is none,
        the model card README.md. What was fitted is written, and if nothing was the pool.

        Args:
            save_directory: the folder, made if it is not there.
            repo_id: ORG/NAME, for the model card and for the hub; None for the folder's name.
            push_to_hub: whether to push as well; `push_to_hub_kwargs` are then as of `push_to_hub`.

        Returns:
            The address of the commit, if it was pushed.

        Raises:
            InputError: the pool is not there, the place cannot be written to, the hub refuses, or there are
                texts, which belong to classes, and nothing was fitted.

        >>> FewShotClassifier("vit_mini_pool", top_k=1).save_pretrained("own")
        >>> FewShotClassifier.from_pretrained("own").top_k
        1
        """
        folder = Path(save_directory)
        name = repo_id or folder.absolute().name
        task = self.task_.to("cpu") if hasattr(self, "task_") else None
        if task is None and self.text_prototypes is not None:
            raise InputError("text_prototypes belong to classes, and a pool has none; expected fit() before")
        tensors, about = task_file.packed(task) if task else open_pool(self.pool, self.arch).packed()
        hub.save(folder, self.get_params(), tensors, about, card(name, about, task))
        return hub.push(name, folder, **push_to_hub_kwargs) if push_to_hub else None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = hub.MESSAGE,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Put what `save_pretrained` writes into a repository on the hub; the address of the commit.

        Args:
            repo_id: ORG/NAME; the repository is made if it is not there.
            commit_message, private, token, branch, create_pr: as huggingface_hub's mixins have them.

        Raises:
            InputError: the pool is not there, the hub cannot be reached, or refuses.

        >>> FewShotClassifier("vit_mini_pool").push_to_hub("me/my-pool")  # doctest: +SKIP
        'https://huggingface.co/me/my-pool/commit/...'
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id=repo_id)
            return hub.push(repo_id, Path(folder), commit_message, private, token, branch, create_pr)

    @classmethod
    def load(cls, file: str | os.PathLike, device: str = "auto") -> Self:
        """A fitted classifier from a file of `save`; it needs neither pool nor support set.

        Args:
            device: as of the constructor.

        Raises:
            InputError: the file is missing or damaged, or holds something else.

        >>> clf = FewShotClassifier.from_pretrained("vit_mini_pool").fit("photos/support")
        >>> clf.save("task.safetensors")
        >>> FewShotClassifier.load("task.safetensors").predict("photos/new").shape
        (2,)
        """
        task = task_file.load(Path(file))
        network, head = task.merged.network, task.head.name
        found = cls(file, device=device, image_size=network.image_size, arch=network.arch, head=head)
        return found._fitted(task.to(find_device(device)))

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Fit the classes of a support set, or without any those of `text_prototypes`.

        Args:
            X: images (see the class), or without `y` a folder with one folder of image files per class; None:
                the texts alone classify (zero-shot), and all of their classes are answers.
            y: (N,) labels, texts or numbers.

        Raises:
            InputError: a pool or images that cannot be read, fewer than two classes, more than 2000 images,
                or a class without a text where there are some.

        >>> import numpy as np
        >>> images = np.random.default_rng(0).random((4, 32, 32, 3))
        >>> FewShotClassifier("vit_mini_pool").fit(images, [0, 0, 1, 1]).classes_
        array([0, 1])
        """
        from_texts = X is None and y is None and self.text_prototypes is not None
        labels = None if y is None else column_or_1d(y, warn=True)
        given = None if from_texts else pictures.labelled(X, labels)
        merging = self._merging()
        opened = open_pool(self.pool, self.arch, self.image_size, self.device)
        return self._fitted(*(fit_pictures(opened, *given, merging) if given else fit_texts(opened, merging)))

    def predict(self, X: Any) -> np.ndarray:
        """The class of each image: (N,), of the labels' kind.

        Args:
            X: images (see the class).

        Raises:
            InputError: an image cannot be read.
            NotFittedError: before `fit`.

        >>> clf = FewShotClassifier("vit_mini_pool").fit("photos/support")
        >>> set(clf.predict("photos/new")) <= {"cat", "dog"}
        True
        """
        found = self.logits(X)
        return self.classes_[found.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class: (N, classes) float64 in [0, 1], each row of sum 1; errors as of
        `predict`. It is calibrated on the support: of answers given with 0.8, about 80 in 100 are right, as
        far as the support can tell.

        >>> clf = FewShotClassifier("vit_mini_pool").fit("photos/support")
        >>> clf.predict_proba("photos/new").sum(1).round(6)
        array([1., 1.])
        """
        logits = torch.from_numpy(self.logits(X))
        return self.task_.probabilities(logits).numpy()

    def logits(self, X: Any) -> np.ndarray:
        """What the largest of which decides, as test_meta_dataset.py computes it: (N, classes) float32;
        errors as of `predict`.

        >>> FewShotClassifier("vit_mini_pool").fit("photos/support").logits("photos/new").shape
        (2, 2)
        """
        check_is_fitted(self, "task_")
        task, items = self.task_, pictures.listed(X)
        if not items:
            pictures.images(items, task.image_size)  # raises
        parts = pictures.batches(items, task.image_size, CHUNK)
        return torch.cat([logits_of(task, part) for part in parts]).numpy()

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """The share of images that are classified correctly, in [0, 1].

        Args:
            X, y: as of `fit`.
            sample_weight: (N,) of the images; None for equal ones.

        Raises:
            InputError: as of `fit`.

        >>> FewShotClassifier("vit_mini_pool").fit("photos/support").score("photos/support") > 0.5
        True
        """
        items, labels = pictures.labelled(X, y)
        return float(super().score(items, labels, sample_weight))

    def robustness(
        self, X: Any, epsilon: Sequence[float] = (2, 4, 8), y: Any = None, attack: str = "pgd"
    ) -> np.ndarray:
        """Until which epsilon each answer stands under a white-box attack on the image: (N,) float64.

        0: the smallest epsilon changed it. NaN: with `y`, the answer was wrong to begin with. An attack finds
        what it finds: another one may find more, so the number is an upper bound.

        Args:
            X: images (see the class); the attack moves what the network sees, after resizing.
            epsilon: increasing radii in 1/255 of the pixel range, L-infinity unless the attack says another.
            y: (N,) true labels; None: the attack wants to change the answers, whatever they are.
            attack: an attack of evaluation with its options, such as "pgd restarts=5" or "autoattack".

        Raises:
            InputError: images that cannot be read, labels that were not fitted, or no such attack.

        >>> clf = FewShotClassifier("vit_mini_pool").fit("photos/support")
        >>> clf.robustness("photos/new", epsilon=(1, 2), attack="pgd steps=2").shape
        (2,)
        """
        check_is_fitted(self, "task_")
        items, labels = (pictures.listed(X), None) if y is None else pictures.labelled(X, y)
        found = parse_attack(attack.split(), epsilon=[float(radius) for radius in epsilon])
        answers = None if labels is None else self._numbers(labels)
        until, done = [], 0
        for part in pictures.batches(items, self.task_.image_size, CHUNK):
            own = logits_of(self.task_, part).argmax(1)
            wanted = own if answers is None else answers[done : done + len(part)]
            numbers = range(done, done + len(part))
            until.append(standing(self.task_, part, wanted, found, self.seed, numbers).until)
            done += len(part)
        return torch.cat(until).numpy()

    def save(self, file: str | os.PathLike) -> None:
        """Write what was fitted as one .safetensors, and a readable .json beside it: merged weights, classes,
        coefficients and provenance. `load` answers with it.

        Raises:
            InputError: another ending, or a place that cannot be written to.

        >>> FewShotClassifier("vit_mini_pool").fit("photos/support").save("task.safetensors")
        """
        check_is_fitted(self, "task_")
        task_file.save(Path(file), self.task_)

    def export(self, file: str | os.PathLike) -> list[Path]:
        """Write the merged network and its head for other tools, by the file's ending: .onnx for ONNX
        runtimes, .pt2 for torch.export, .safetensors for timm; without ending a folder for timm. The paths
        written, that of `file` first.

        Raises:
            InputError: another ending, a missing package, a mixture of two networks, or a place that cannot
                be written to.

        >>> clf = FewShotClassifier("vit_mini_pool").fit("photos/support")
        >>> [path.name for path in clf.export("net.safetensors")]
        ['net.safetensors', 'net.safetensors.README.txt', 'net.safetensors.prototypes.safetensors']
        """
        check_is_fitted(self, "task_")
        path, formats = Path(file), {".onnx": "onnx", ".pt2": "torch", ".safetensors": "timm", "": "timm"}
        if path.suffix not in formats:
            known = ", ".join(filter(None, formats))
            raise InputError(f"{path}: expected a name that ends in {known}, or a folder's, without ending")
        export.check_single(self.task_.head)
        return export.save(path, formats[path.suffix], self.task_.to("cpu").merged)

    def _merging(self) -> Merging:
        routing = Routing(self.beta, self.gamma, self.top_k, self.augment_probability, self.route_epsilon)
        head = parse_head(self.head.split()) if isinstance(self.head, str) else self.head
        weights = None if self.pretrained_checkpoint is None else Path(self.pretrained_checkpoint)
        shares = self.coefficients
        asked = routing if shares == "route" or routing != Routing() else None
        if isinstance(shares, str):
            if shares != "route":
                raise InputError(f"coefficients is {shares!r}, expected numbers, 'route' or None")
            shares = None
        texts = text_prototypes.given(self.text_prototypes)
        return Merging(asked, shares, tuple(self.trims), self.seed, head, weights, texts, self.weights_key)

    def _fitted(self, task: Task, classes: np.ndarray | None = None) -> Self:
        self.task_ = task
        self.classes_ = np.asarray(task.classes) if classes is None else classes
        self.coefficients_ = np.array(task.merged.coefficients)
        return self

    def _numbers(self, labels: np.ndarray) -> Tensor:
        unknown = set(labels.tolist()) - set(self.classes_.tolist())
        if unknown:
            raise InputError(f"label {min(unknown)!r} was not fitted; fitted: {self.classes_.tolist()}")
        return torch.from_numpy(np.searchsorted(self.classes_, labels))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # images, not tables
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags
