"""A multilayer perceptron with one hidden layer."""

from torch import Tensor, nn
from torch.nn import functional


class MLP(nn.Module):
    """Two linear layers, 100 -> 1024 -> `num_classes`, with a ReLU between.

    In: N x 100 float32. Out: logits, N x num_classes float32.
    Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 323, 1986.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(100, 1024)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(functional.relu(self.fc1(x)))
        return logits
