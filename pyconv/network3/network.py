"""The network of the book's program network3.py: layers, and stochastic gradient descent on mini-batches."""

from __future__ import annotations

import math
import numbers
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyconv.augmentation import RandomDistortion
from pyconv.lowering import (
    Operation,
    PlanBuilder,
    PlanTable,
    UnsupportedError,
    check_parameters,
    check_plain,
)
from pyconv.network3.data_parallel import DataParallelDescent, Processes
from pyconv.network3.descent import (
    Augment,
    CapturedDescent,
    CompiledDescent,
    Data,
    Descent,
    MiniBatches,
    fingerprint,
)
from pyconv.network3.history import History
from pyconv.network3.layers import (
    ConvLayer,
    ConvPoolLayer,
    FullyConnectedLayer,
    ImageLayer,
    Layer,
    PoolLayer,
    SoftmaxLayer,
)
from pyconv.network3.rate import Eta, Rate, checked_number

if TYPE_CHECKING:
    from pyconv.network3.checkpoint import Checkpoint

_EVALUATION_BATCH = {
    "cpu": 500,
    "cuda": 5000,
}  # images; on the CPU what stays in cache, on a GPU what occupies it


Callback = Callable[[dict[str, Any]], object]
"""callback(record): told of an epoch by its entries of the `History`; returns True to end the training."""


def size(data: Data) -> int:
    """The number of examples in `data`."""
    return len(data[0])


class DivergenceError(ArithmeticError):
    """Training stopped because a cost or a parameter became NaN or infinite.

    Attributes:
        epoch, mini_batch: where, both counted from 0.
    """

    def __init__(self, epoch: int, mini_batch: int, reason: str) -> None:
        super().__init__(f"training stopped at mini-batch {mini_batch} of epoch {epoch}: {reason}")
        self.epoch = epoch
        self.mini_batch = mini_batch


class Network(nn.Module):
    """A feedforward network; the last layer is a `SoftmaxLayer` if it is to be trained.

    As a `torch.nn.Module` it maps x (n, features) to the last layer's output (n, classes); in training mode
    with dropout, in inference mode (`eval()`, which `SGD` leaves it in) without.

    Args:
        layers: each takes as many numbers as the one before it gives.
        mini_batch_size: the same as in the convolutional layers' image_shape.

    Attributes:
        layers, mini_batch_size: the arguments.
        params: w and b of each layer that has them, in order.

    Raises:
        ValueError: the layers do not fit each other or the mini-batch size, or none has parameters.
        TypeError: something that is not a layer.
    """

    def __init__(self, layers: Sequence[Layer], mini_batch_size: int) -> None:
        super().__init__()
        if not layers:
            raise ValueError("expected at least one layer, but got none")
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, but got {mini_batch_size}")
        for j, layer in enumerate(layers):
            name = f"layer {j} ({type(layer).__name__})"
            _check_layer(name, layer)
            for i, other in enumerate(layers[:j]):
                if layer is other:
                    raise ValueError(f"{name} is the same object as layer {i}; a network holds a layer once")
            if j > 0 and layer.n_in != layers[j - 1].n_out:
                raise ValueError(
                    f"{name} takes {layer.n_in} inputs, but layer {j - 1} ({type(layers[j - 1]).__name__}) "
                    f"gives {layers[j - 1].n_out}"
                )
            if isinstance(layer, ImageLayer) and layer.image_shape[0] != mini_batch_size:
                raise ValueError(
                    f"{name} has image_shape {layer.image_shape}, that is mini-batches of "
                    f"{layer.image_shape[0]}, but mini_batch_size is {mini_batch_size}"
                )
        if not any(layer.params for layer in layers):
            names = ", ".join(type(layer).__name__ for layer in layers)
            raise ValueError(f"expected at least one layer with parameters, but got only {names}")
        self.layers = nn.ModuleList(layers)
        self.mini_batch_size = mini_batch_size

    @property
    def params(self) -> list[nn.Parameter]:
        return [param for layer in self.layers for param in layer.params]

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [layer.w for layer in self.layers if layer.params]

    # ------------------------------------------------------------------------------------------------------
    # Evaluation
    # ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(n, features) -> (n, classes), for any n; images (n, channels, height, width) are taken as well."""
        if x.dim() < 2 or math.prod(x.shape[1:]) != self.layers[0].n_in:
            raise RuntimeError(f"expected x of shape (n, {self.layers[0].n_in}), but got {tuple(x.shape)}")
        for layer in self.layers:
            x = layer(x)
        return x

    def cost(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-likelihood cost of the examples x (n, features), labels y (n,), without the L2 term."""
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x)
        return last.cost(x, y)

    def probabilities(self, x: Tensor) -> Tensor:
        """The last layer's output (n, classes) for the examples x (n, features), without dropout and gradients."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return torch.cat([self(batch) for batch in x.split(_EVALUATION_BATCH.get(x.device.type, len(x)))])
        finally:
            self.train(was_training)

    def predict(self, x: Tensor) -> Tensor:
        """The predicted classes (n,) int64 of the examples x (n, features), without dropout."""
        return self.probabilities(x).argmax(dim=1)

    def accuracy(self, data: Data) -> float:
        """The fraction of all examples of `data` whose label is predicted, without dropout.

        Raises:
            RuntimeError, TypeError, ValueError: as `SGD` does for its data.
        """
        x, y = self._prepare_evaluation("data", data)
        if len(x) == 0:
            raise ValueError("data: expected at least 1 example, but got 0")
        return self._count_correct(x, y) / len(y)

    def _count_correct(self, x: Tensor, y: Tensor) -> int:
        return int((self.predict(x) == y).sum())

    def _sum_of_costs(self, x: Tensor, y: Tensor) -> float:
        """The examples' costs without dropout and L2 term; the network is in inference mode."""
        count = _EVALUATION_BATCH.get(x.device.type, len(x))
        with torch.no_grad():
            parts = [self.cost(*part).double() * len(part[1]) for part in zip(x.split(count), y.split(count))]
        return float(torch.stack(parts).sum())

    # ------------------------------------------------------------------------------------------------------
    # Training
    # ------------------------------------------------------------------------------------------------------

    def SGD(
        self,
        training_data: Data,
        epochs: int,
        mini_batch_size: int,
        eta: Eta,
        validation_data: Data,
        test_data: Data | None,
        lmbda: float = 0.0,
        *,
        momentum: float = 0.0,
        shuffle: bool = False,
        drop_last: bool = True,
        augment: Augment | None = None,
        generator: torch.Generator | None = None,
        patience: int | None = None,
        diagnose: bool | int = False,
        callback: Callback | Sequence[Callback] | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
        verbose: bool = True,
        restore_best: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        compiled: bool = True,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> History:
        """Train by mini-batch stochastic gradient descent, and print what the book's program prints.

        The mini-batches are taken from the training data in the given order. One of them costs
        ``-mean log p[y] + 0.5 * lmbda * (sum of the squares of all weights) / (number of training
        mini-batches)``; biases are not in the sum. The validation accuracy is taken after every epoch, the
        test accuracy where it is at least the best so far. Of every set, the examples that do not fill a last
        mini-batch are dropped.

        Ctrl-C stops the training after a mini-batch, at most a few hundredths of a second later; the parameters
        are those after it.

        Data are moved to the device of the parameters, and floating-point data to their dtype, once.

        Args:
            training_data, validation_data, test_data: (x, y) each, see `Data`; without test data (None) the
                lines about test accuracy are not printed.
            epochs: at least 1.
            mini_batch_size: that of the network.
            eta: learning rate; or a function of the epoch, counted from 0, that returns it; or a fresh schedule of
                torch.optim.lr_scheduler, whose optimizer's rate counts and which goes on one step after every epoch
                (ReduceLROnPlateau with the validation accuracy, so it takes ``mode="max"``).
            lmbda: L2 regularisation.
            momentum: mu of ``v <- mu v + dC/dw, w <- w - eta v``, the form of torch.optim.SGD; v starts at 0 in
                each call.
            shuffle: take the examples in a new random order in every epoch.
            drop_last: False to train on the examples that do not fill a last mini-batch, too.
            augment: called before a mini-batch as ``augment(indices, x)``, with the positions (n,) int64 of its
                examples in the training data and copies x (n, features) of them, which it may change in place; what
                it returns is not used. A `pyconv.RandomDistortion` is the fast one: it distorts many mini-batches at
                once, in native code. Where it has a method `set_epoch`, that is called with the number of each epoch.
            generator: source of the orders of `shuffle`, on the CPU; PyTorch's default if None.
            patience: stop early, when the validation accuracy has not risen above its best for so many epochs.
            diagnose: after every epoch also take the accuracy on the training data (on the first so many, if it is a
                number) and the cost on the validation data, which `pyconv.network3.diagnose` looks at.
            callback: called after every epoch with its entries of the `History`, by key; or a sequence of such
                functions. The training ends after an epoch for which one returns True.
            progress: given the range of an epoch's mini-batches, returns what to iterate over: tqdm, for
                example.
            verbose: whether to print.
            restore_best: set the parameters back to those of the best epoch at the end.
            checkpoint: a directory; after every epoch ``last.safetensors`` in it gets all that a training needs to go
                on, and ``best.safetensors`` the best epoch's network, which `load_network` reads.
            resume: go on after the last epoch of the checkpoint, if there is one. All other arguments are to be as in
                the training that wrote it, only `epochs` may be larger; parameters and History are then, on the CPU
                bit for bit, what they would have been without the interruption. (Random numbers are PyTorch's
                and those of `generator` and the layers' generators; what a function of yours draws elsewhere is not
                known here, nor what a callback changes besides the parameters' values and these random numbers.)
            compiled: run the mini-batches in native code, see `compile`; on a GPU, capture a mini-batch as a
                CUDA graph and replay it, without waiting for the GPU before the end of an epoch. Layers that
                `compile` does not know make the training run layer by layer, with the same results, after a
                warning that names them.
            process_group: train over its processes, all of which call this with the same arguments. Each computes the
                gradient of a contiguous share of every mini-batch, and the sum updates the parameters everywhere. All
                get the same parameters, History (but for `seconds`) and DivergenceError, which are, up to rounding,
                those of one process; so are the dropout masks. Initial parameters and random numbers are the first
                process's, which alone prints, keeps the checkpoint and calls `eta`, `callback` and `progress` (which
                is to give all mini-batches in order); `augment` is called in each, for whole mini-batches, and a layer
                of your own sees its process's share. Runs layer by layer, whatever `compiled` says. If a process ends
                early, the others get a RuntimeError from the group, with some backends only after its timeout, unless
                their launcher ends them, as torchrun does.

        Raises:
            ValueError: a number out of range, labels outside the classes, fewer examples than one mini-batch,
                a mini-batch size other than the network's, or validation or test data with NaN or infinity; settings
                other than those of the training to be resumed; fewer examples in a mini-batch than there are
                processes, or other data or settings in one of them.
            FileExistsError: `checkpoint` holds a training, and `resume` does not say to go on with it.
            OSError: `checkpoint` is not a directory, or cannot be written.
            DataError: `checkpoint` holds damaged files.
            RuntimeError: examples of the wrong shape or dtype.
            TypeError: something other than tensors as data or numbers as numbers, or a last layer without a
                cost.
            DivergenceError: a cost or a parameter became NaN or infinite. If the mini-batch itself holds NaN
                or infinity, the parameters stay as the mini-batch before left them; if they are what
                diverged, they are set back to their values after the last complete epoch.
        """
        self._check_hyperparameters(epochs, mini_batch_size, lmbda, momentum, patience, diagnose)
        rate = Rate(eta)
        batches = MiniBatches(
            *self._prepare("training_data", training_data, mini_batch_size, truncate=False),
            mini_batch_size, shuffle, drop_last, augment, generator,
        )  # fmt: skip
        validation = self._prepare_evaluation("validation_data", validation_data, mini_batch_size)
        test = None
        if test_data is not None:
            test = self._prepare_evaluation("test_data", test_data, mini_batch_size)
        callbacks = _callbacks(callback)
        diagnosed = len(batches.x) if diagnose is True else diagnose
        processes = Processes(process_group, batches.x.device)
        descent = self._descent(batches, lmbda / len(batches), momentum, progress is None, compiled, processes)
        generators = self._generators(batches)
        if processes.count > 1:
            processes.check_equal(
                {
                    "parameters": [(tuple(param.shape), param.dtype, param.requires_grad) for param in self.params],
                    "number of random number generators": len(generators),
                    "epochs": epochs,
                    "patience": patience,
                    "diagnose": diagnosed,
                    "restore_best": restore_best,
                    "test_data": None if test is None else fingerprint(test),
                    **self._settings(batches, validation, lmbda, momentum),
                }
            )
        store: Checkpoint | None = None

        def say(line: str) -> None:
            if verbose and processes.rank == 0:
                print(line)

        def begin() -> tuple[History, list[Tensor] | None]:
            """The history so far, and its best epoch's parameters, if there is one."""
            nonlocal store
            if checkpoint is None:
                return History(), None
            from pyconv.network3.checkpoint import Checkpoint
            from pyconv.network3.serialization import describe

            settings = {
                "layers": describe(self),
                "trained": [param.requires_grad for param in self.params],
                "test_data": None if test is None else fingerprint(test),
                **self._settings(batches, validation, lmbda, momentum),
            }
            store = Checkpoint(checkpoint, self, settings, generators, descent.velocities)
            if not store.exists:
                return History(), None
            if not resume:
                raise FileExistsError(
                    f"{os.fspath(checkpoint)} holds a training already: give resume=True to go on with it, or "
                    f"another directory"
                )
            history, best_params = store.load()
            finished = len(history["epoch"])
            if epochs < finished:
                raise ValueError(
                    f"expected epochs to be at least {finished}, which {os.fspath(checkpoint)} holds, but got {epochs}"
                )
            rate.replay(history["eta"], history["validation_accuracy"])
            return history, best_params

        def end_epoch(record: dict[str, Any]) -> bool:
            """Whether the training is over."""
            rate.end_epoch(record["validation_accuracy"])
            try:
                return any([function(record) is True for function in callbacks])  # all of them, whatever one says
            finally:
                if store is not None:  # after the callbacks, which may change what is saved
                    store.save(history, best_params)

        def synchronize() -> None:
            state = dict.fromkeys([*self.params, *self.parameters(), *self.buffers(), *descent.velocities.values()])
            processes.synchronize(state, generators)

        history, best_params = processes.first(begin)
        history.validation_size = size(validation)
        synchronize()
        good_params = _copies(self.params)
        if best_params is None:
            best_params = good_params
        is_over = False
        for epoch in range(len(history["epoch"]), epochs):
            if is_over or (patience is not None and history.epochs_without_improvement >= patience):
                break
            self.train()
            start = time.perf_counter()
            costs: list[float] = []
            batches.begin_epoch(epoch)
            current_eta = processes.first(rate.of_epoch, epoch)
            descent.begin_epoch(current_eta)
            for index in processes.mini_batches(len(batches), progress):
                iteration = epoch * len(batches) + index
                if iteration % 1000 == 0:
                    say(f"Training mini-batch number {iteration}")
                costs += self._finite(descent.train(index), epoch, batches, good_params)
            costs += self._finite(descent.end_epoch(), epoch, batches, good_params)
            _wait_for(batches.x.device)
            seconds = time.perf_counter() - start
            self.eval()
            if not _all_finite(self.params):
                last = len(batches) - 1
                raise self._divergence(
                    epoch, last, "parameters are not finite", batches.examples(last), good_params
                )
            good_params = _copies(self.params)

            validation_accuracy = processes.mean(self._count_correct, *validation)
            test_accuracy = None
            say(f"Epoch {epoch}: validation accuracy {validation_accuracy:.2%}")
            if validation_accuracy >= history.best_validation_accuracy:
                say("This is the best validation accuracy to date.")
                best_params = good_params
                if test is not None:
                    test_accuracy = processes.mean(self._count_correct, *test)
                    say(f"The corresponding test accuracy is {test_accuracy:.2%}")
                history.best_validation_accuracy = validation_accuracy
                history.best_test_accuracy = test_accuracy
                history.best_epoch, history.best_iteration = epoch, (epoch + 1) * len(batches) - 1
            train_accuracy = validation_cost = None
            if diagnosed:
                train_accuracy = processes.mean(self._count_correct, batches.x[:diagnosed], batches.y[:diagnosed])
                validation_cost = processes.mean(self._sum_of_costs, *validation)
            record = {
                "epoch": epoch,
                "eta": current_eta,
                "train_cost": sum(costs) / len(batches),
                "train_accuracy": train_accuracy,
                "validation_cost": validation_cost,
                "validation_accuracy": validation_accuracy,
                "test_accuracy": test_accuracy,
                "seconds": seconds,
            }
            history._append(record)
            is_over = processes.first(end_epoch, record)
            synchronize()  # after callbacks, which may change parameters and draw random numbers
        say("Finished training network.")
        say(
            f"Best validation accuracy of {history.best_validation_accuracy:.2%} "
            f"obtained at iteration {history.best_iteration}"
        )
        if history.best_test_accuracy is not None:
            say(f"Corresponding test accuracy of {history.best_test_accuracy:.2%}")
        if restore_best:
            self._set_params(best_params)
        return history

    def _descent(
        self,
        batches: MiniBatches,
        decay: float,
        momentum: float,
        ahead: bool,
        compiled: bool,
        processes: Processes,
    ) -> Descent | CompiledDescent | CapturedDescent:
        if processes.count > 1:
            return DataParallelDescent(self, batches, decay, momentum, processes)
        if compiled:
            try:
                if batches.x.device.type == "cpu":
                    return CompiledDescent(self, batches, decay, momentum, ahead)  # a progress might not come to all
                if batches.x.device.type == "cuda":
                    return CapturedDescent(self, batches, decay, momentum)
            except UnsupportedError as error:
                warnings.warn(f"training is not compiled: {error}", stacklevel=3)
        return Descent(self, batches, decay, momentum)

    def _settings(self, batches: MiniBatches, validation: Data, lmbda: float, momentum: float) -> dict[str, Any]:
        """What determines the training, beside the layers, the random numbers and the rates."""
        augment = batches.augment
        return {
            "dtype": str(batches.x.dtype),
            "mini_batch_size": self.mini_batch_size,
            "lmbda": float(lmbda),
            "momentum": float(momentum),
            "shuffle": bool(batches.shuffle),
            "drop_last": bool(batches.drop_last),
            # A function of one's own has no description that a process after this one could compare.
            "augment": repr(augment) if isinstance(augment, RandomDistortion) else augment is not None,
            "training_data": fingerprint((batches.x, batches.y)),
            "validation_data": fingerprint(validation),
        }

    def _generators(self, batches: MiniBatches) -> list[torch.Generator]:
        """Of all random numbers of a training; some may be there more than once."""
        own = [batches.generator, *(getattr(layer, "generator", None) for layer in self.layers)]
        generators = [torch.default_generator, *(generator for generator in own if generator is not None)]
        device = batches.x.device
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index])
        return generators

    def _check_hyperparameters(
        self, epochs: int, mini_batch_size: int, lmbda: float, momentum: float, patience: int | None, diagnose: int
    ) -> None:
        for name, count in (("epochs", epochs), ("patience", 1 if patience is None else patience)):
            if isinstance(count, bool) or not isinstance(count, numbers.Integral):
                raise TypeError(f"{name} must be an int, but got {count!r}")
        if not hasattr(self.layers[-1], "cost"):
            raise TypeError(
                f"expected a last layer that has a cost (SoftmaxLayer), "
                f"but got {type(self.layers[-1]).__name__}"
            )
        if mini_batch_size != self.mini_batch_size:
            raise ValueError(
                f"expected mini_batch_size {self.mini_batch_size}, which the network was made for, "
                f"but got {mini_batch_size}"
            )
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, but got {epochs}")
        if not isinstance(diagnose, numbers.Integral):
            raise TypeError(f"diagnose must be True, False or a number of examples, but got {diagnose!r}")
        if diagnose < 0:
            raise ValueError(f"diagnose must be True, False or a number of examples, but got {diagnose}")
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1, but got {patience}")
        checked_number(lmbda, "lmbda")
        if checked_number(momentum, "momentum") >= 1.0:
            raise ValueError(f"momentum must be less than 1, but got {momentum}")

    def _prepare(self, name: str, data: Data, mini_batch_size: int = 1, truncate: bool = True) -> Data:
        """Check `data`, drop what does not fill a mini-batch if asked to, and move the rest to the parameters'
        device and dtype."""
        try:
            x, y = data
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}: expected a pair (x, y) of tensors, but got {type(data).__name__}"
            ) from None
        for part, tensor in (("x", x), ("y", y)):
            if not isinstance(tensor, Tensor):
                hint = "; torch.from_numpy makes it one" if isinstance(tensor, np.ndarray) else ""
                raise TypeError(
                    f"{name}: expected {part} to be a tensor, but got {type(tensor).__name__}{hint}"
                )
        features, classes = self.layers[0].n_in, self.layers[-1].n_out
        if x.dim() != 2 or x.shape[1] != features:
            raise RuntimeError(f"{name}: expected x of shape (n, {features}), but got {tuple(x.shape)}")
        if y.dim() != 1 or len(y) != len(x):
            raise RuntimeError(
                f"{name}: expected y of shape ({len(x)},), one label for each x, got {tuple(y.shape)}"
            )
        if not x.is_floating_point():
            raise RuntimeError(f"{name}: expected x of a floating-point dtype, but got {x.dtype}")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise RuntimeError(f"{name}: expected y of an integer dtype, but got {y.dtype}")
        if len(x) < mini_batch_size:
            raise ValueError(
                f"{name}: expected at least one mini-batch of {mini_batch_size}, but got {len(x)} examples"
            )
        foreign = ((y < 0) | (y >= classes)).nonzero()
        if len(foreign) > 0:
            index = int(foreign[0])
            raise ValueError(
                f"{name}: expected labels from 0 to {classes - 1}, but got {int(y[index])} at index {index}"
            )
        whole = len(x) // mini_batch_size * mini_batch_size if truncate else len(x)
        param = self.params[0]
        return x[:whole].to(param.device, param.dtype), y[:whole].to(param.device, torch.int64)

    def _prepare_evaluation(self, name: str, data: Data, mini_batch_size: int = 1) -> Data:
        """`_prepare`, and refuse NaN and infinity: outputs that are NaN would count as a prediction."""
        x, y = self._prepare(name, data, mini_batch_size)
        if not _all_finite([x]):
            index = int((~x.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"{name}: expected finite x, but got NaN or infinity at index {index}")
        return x, y

    def _finite(
        self, known: list[tuple[int, float]], epoch: int, batches: MiniBatches, good_params: list[Tensor]
    ) -> list[float]:
        """The costs in `known` (mini-batch, cost); DivergenceError for the first that is NaN or infinite."""
        for mini_batch, cost in known:
            if not math.isfinite(cost):
                raise self._divergence(
                    epoch, mini_batch, f"the cost is {cost}", batches.examples(mini_batch), good_params
                )
        return [cost for _, cost in known]

    def _divergence(
        self, epoch: int, mini_batch: int, symptom: str, x: Tensor, good_params: list[Tensor]
    ) -> DivergenceError:
        if _all_finite(self.params) and not _all_finite([x]):
            reason = (
                "its examples hold NaN or infinity; the parameters are as the mini-batch before left them"
            )
        else:
            self._set_params(good_params)
            since = "their initial values" if epoch == 0 else f"their values after epoch {epoch - 1}"
            reason = f"eta is probably too large; the parameters are set back to {since}"
        return DivergenceError(epoch, mini_batch, f"{symptom}; {reason}")

    def _set_params(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for param, value in zip(self.params, values):
                param.copy_(value)

    def compile(self) -> PlanTable:  # type: ignore[override]
        """The plan by which `SGD` trains, as a table: operations, shapes, kernels, FLOPs and bytes of a mini-batch.

        (It has nothing to do with `torch.nn.Module.compile`, for which `torch.compile(network)` stands.)

        Raises:
            UnsupportedError: a layer that a plan does not know; the message names it.
        """
        return PlanTable(self._builder(lambda p: False).plan)

    def _builder(self, in_l2: Callable[[Tensor], bool]) -> PlanBuilder:
        return PlanBuilder(
            self._lowered(), (self.layers[0].n_in,), self.mini_batch_size, trained=lambda p: p.requires_grad,
            in_l2=in_l2,
        )  # fmt: skip

    def _lowered(self) -> list[Operation]:
        """The operations of a training step.

        Raises:
            UnsupportedError: a layer that a plan does not know; the message names it.
        """
        for name in ("cost", "forward", "params"):
            if name in vars(self) or getattr(type(self), name) is not getattr(Network, name):
                raise UnsupportedError(f"{type(self).__name__} has a {name} of its own, which a plan would not run")
        operations: list[Operation] = []
        named: list[tuple[str, nn.Module]] = []
        last = len(self.layers) - 1
        for j, layer in enumerate(self.layers):
            name = f"layer {j} ({type(layer).__name__})"
            if type(layer) not in _KNOWN_LAYERS:
                raise UnsupportedError(f"{name} is none of {', '.join(known.__name__ for known in _KNOWN_LAYERS)}")
            if isinstance(layer, SoftmaxLayer) != (j == last):
                raise UnsupportedError(f"{name}: a SoftmaxLayer is the last layer of a plan, and nothing else is")
            check_plain(f"layer {j}", layer)
            named.append((str(j), layer))
            try:
                if isinstance(layer, PoolLayer):
                    operations[-1:] = layer._lowered_with(self.layers[j - 1] if j > 0 else None)
                else:
                    operations += layer._lowered()
            except UnsupportedError as error:
                raise UnsupportedError(f"{name}: {error}") from None
        check_parameters(named)
        return operations

    # ------------------------------------------------------------------------------------------------------
    # Files
    # ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the layers and their parameters; `load_network` reads them back. See
        `pyconv.network3.serialization`."""
        from pyconv.network3.serialization import save_network

        save_network(self, path)


def _callbacks(callback: Callback | Sequence[Callback] | None) -> list[Callback]:
    if callback is None:
        return []
    callbacks = [callback] if callable(callback) or not isinstance(callback, Iterable) else list(callback)
    for function in callbacks:
        if not callable(function):
            raise TypeError(
                f"callback must be a function of an epoch's record, or a list of such, but got {callback!r}"
            )
    return callbacks


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_KNOWN_LAYERS = (ConvLayer, ConvPoolLayer, FullyConnectedLayer, PoolLayer, SoftmaxLayer)
"""Those that a plan may hold; not classes derived from them, which may compute something else."""

_LAYER_ATTRIBUTES = ("n_in", "n_out", "w", "b", "params", "forward")


def _check_layer(name: str, layer: object) -> None:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{name} is not a torch.nn.Module; derive it from pyconv.network3.Layer")
    optional = ("w", "b") if getattr(layer, "params", None) == [] else ()
    missing = [
        attribute
        for attribute in _LAYER_ATTRIBUTES
        # Looked up in the class too, since the property `params` of a Layer without w fails as if it were
        # missing; and nn.Module itself has a forward, which only raises.
        if attribute not in optional
        and not (hasattr(type(layer), attribute) or hasattr(layer, attribute))
        or getattr(type(layer), attribute, None) is nn.Module.forward
    ]
    if missing:
        *first, last = _LAYER_ATTRIBUTES
        raise TypeError(f"{name} lacks {', '.join(missing)}; a layer has {', '.join(first)} and {last}")
    if "_parameters" not in vars(layer):
        raise TypeError(f"{name} is not initialised; its __init__ begins with super().__init__()")
    for param in layer.params:
        if not isinstance(param, nn.Parameter):
            raise TypeError(f"{name}: expected params to be torch.nn.Parameter, but got {type(param).__name__}")


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _copies(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]
