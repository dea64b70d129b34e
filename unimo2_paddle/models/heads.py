"""Output heads: poolers, tied-embedding prediction (masked words, captions, masked grounded tokens), masked regions, classification."""
import paddle
import paddle.nn.functional as F
from paddle import nn

from unimo2_paddle.models.transformer import layer_norm, linear


class Pooler(nn.Layer):
    """relu(fc(first position)); the authors use relu, not tanh."""

    def __init__(self, name, hidden_size, init_std):
        super().__init__()
        self.dense = linear(name, hidden_size, hidden_size, init_std)

    def forward(self, states):
        """``[B, T, H]`` (or its first position ``[B, H]``) to ``[B, H]``."""
        return F.relu(self.dense(states[:, 0] if len(states.shape) == 3 else states))


class TiedPredictor(nn.Layer):
    """fc, GELU, norm, then a product with an embedding table plus a bias (parameters ``{name}_trans_*``, ``{name}_out_fc.*``).

    Serves masked and caption words (table = word embedding) and masked grounded tokens (table = codebook).
    """

    def __init__(self, name, hidden_size, classes, activation, init_std, tied=True):
        super().__init__()
        self.activation = {"gelu": F.gelu, "relu": F.relu}[activation]
        self.transform = linear(f"{name}_trans_fc", hidden_size, hidden_size, init_std)
        self.norm = layer_norm(f"{name}_trans", hidden_size)
        self.tied = tied
        if not tied:
            self.weight = self.create_parameter([hidden_size, classes], attr=paddle.ParamAttr(
                name=f"{name}_out_fc.w_0", initializer=nn.initializer.TruncatedNormal(std=init_std)))
        self.bias = self.create_parameter([classes], attr=paddle.ParamAttr(name=f"{name}_out_fc.b_0"), is_bias=True)

    def forward(self, states, table):
        """Logits ``[N, C]`` of ``states`` ``[N, H]``; ``table`` is the embedding ``[C, H]`` the output is tied to."""
        hidden = self.norm(self.activation(self.transform(states)))
        if self.tied:
            return paddle.matmul(hidden, table, transpose_y=True) + self.bias
        return F.linear(hidden, self.weight, self.bias)


class ClassificationHead(nn.Layer):
    """Dropout and one fully connected layer: ``cls_out_w`` [H, N], ``cls_out_b`` [N].

    The authors use the names ``cls_out_new_w/b`` when a task starts from their MNLI model, and ``cls_out_{N}_w/b`` in UNIMO;
    ``prefix`` chooses.
    """

    def __init__(self, hidden_size, num_labels, dropout=0.1, init_std=0.02, prefix="cls_out"):
        super().__init__()
        self.dropout = dropout
        self.weight = self.create_parameter([hidden_size, num_labels], attr=paddle.ParamAttr(
            name=f"{prefix}_w", initializer=nn.initializer.TruncatedNormal(std=init_std)))
        self.bias = self.create_parameter([num_labels], attr=paddle.ParamAttr(name=f"{prefix}_b"), is_bias=True)

    def forward(self, features):
        """Logits ``[B, N]`` of pooled ``features`` ``[B, H]``."""
        return F.linear(F.dropout(features, self.dropout, training=self.training), self.weight, self.bias)


class EntailmentHead(nn.Layer):
    """UNIMO's visual entailment head: two linear layers, dropout but no activation between them (``cls_out_w_0`` ... ``cls_out_b_1``)."""

    INNER = 2048  # fixed in the authors' code

    def __init__(self, hidden_size, num_labels=3, dropout=0.1, init_std=0.02):
        super().__init__()
        self.dropout = dropout

        def dense(number, inputs, outputs):
            return nn.Linear(inputs, outputs, bias_attr=paddle.ParamAttr(name=f"cls_out_b_{number}"), weight_attr=paddle.ParamAttr(
                name=f"cls_out_w_{number}", initializer=nn.initializer.TruncatedNormal(std=init_std)))

        self.inner, self.outer = dense(0, hidden_size, self.INNER), dense(1, self.INNER, num_labels)

    def forward(self, features):
        """Logits ``[B, N]`` of fused ``features`` ``[B, H]``."""
        return self.outer(F.dropout(self.inner(features), self.dropout, training=self.training))


class RegionPredictor(nn.Layer):
    """What a masked region was: fc, GELU, norm, then its class and its feature vector (UNIMO's visual pre-training).

    The authors released neither these heads nor their names; ``{name}_trans_*``, ``{name}_class_fc.*`` and ``{name}_feature_fc.*``
    follow their habit.

    Args:
        classes, features: sizes of the two outputs; 0 leaves that one out.
    """

    def __init__(self, name, hidden_size, classes, features, activation, init_std):
        super().__init__()
        self.activation = {"gelu": F.gelu, "relu": F.relu}[activation]
        self.transform = linear(f"{name}_trans_fc", hidden_size, hidden_size, init_std)
        self.norm = layer_norm(f"{name}_trans", hidden_size)
        self.classes = linear(f"{name}_class_fc", hidden_size, classes, init_std) if classes else None
        self.features = linear(f"{name}_feature_fc", hidden_size, features, init_std) if features else None

    def forward(self, states):
        """(class logits ``[N, C]`` or ``None``, features ``[N, D]`` or ``None``) of ``states`` ``[N, H]``."""
        hidden = self.norm(self.activation(self.transform(states)))
        return tuple(None if part is None else part(hidden) for part in (self.classes, self.features))
