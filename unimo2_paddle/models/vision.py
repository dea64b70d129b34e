"""Visual Transformer: patches of an NHWC image to states (UNIMO-2 section "end-to-end"; authors' vision_transformer_encoder)."""
import paddle
import paddle.nn.functional as F
from paddle import nn

from unimo2_paddle.models import fused
from unimo2_paddle.models.transformer import Encoder, layer_norm, length


def resize_position_embeddings(table, grid):
    """Resize the stored position table to ``grid`` x ``grid`` patches, inside the graph (so gradients reach the table).

    Args:
        table: ``[1, 1 + G*G, H]``, the [CLS] position first.
        grid: patches per side wanted.

    Returns:
        ``[1, 1 + grid*grid, H]``: bicubic (A = -0.75), half-pixel centres, no antialiasing, [CLS] kept.
    """
    stored = int(round((table.shape[1] - 1) ** 0.5))
    if stored == grid:
        return table
    width = table.shape[2]
    patches = table[:, 1:].reshape([1, stored, stored, width]).transpose([0, 3, 1, 2])
    patches = F.interpolate(patches, size=[grid, grid], mode="bicubic", align_corners=False)
    return paddle.concat([table[:, :1], patches.transpose([0, 2, 3, 1]).reshape([1, grid * grid, width])], axis=1)


class VisionTransformer(nn.Layer):
    """Pre-norm ViT with a final norm. Parameters: ``vit.*``.

    The patch convolution pads with (P - 1) // 2 zeros, so patches are shifted by that many pixels up and left and the last P // 2
    rows and columns of the image are never read; the released weights were trained so.
    """

    EPSILON = 1e-12  # fixed in the authors' code; their config key vit_layer_norm_eps is not used

    def __init__(self, config):
        super().__init__()
        hidden, patch, std = config.hidden_size, config.resolution, config.initializer_range
        normal = nn.initializer.TruncatedNormal(std=std)
        self.patch, self.image_size = patch, config.image_size
        self.hidden_dropout = config.vit_hidden_dropout_prob
        self.patch_weight = self.create_parameter(
            [hidden, 3, patch, patch], attr=paddle.ParamAttr(name="vit.patch_embeddings_projection_weight", initializer=normal))
        self.patch_bias = self.create_parameter(
            [hidden], attr=paddle.ParamAttr(name="vit.patch_embeddings_projection_bias"), is_bias=True)
        self.class_token = self.create_parameter(
            [1, 1, hidden], attr=paddle.ParamAttr(name="vit.cls_token_embeddings", initializer=normal))
        self.positions = self.create_parameter(
            [1, 1 + config.position_grid ** 2, hidden], attr=paddle.ParamAttr(name="vit.position_embeddings", initializer=normal))
        self.encoder = Encoder(
            "vit", range(config.vit_num_hidden_layers), hidden, config.vit_num_attention_heads, config.vit_hidden_act,
            config.vit_hidden_dropout_prob, config.vit_attention_probs_dropout_prob, std, pre_norm=True, epsilon=self.EPSILON)
        self.norm = layer_norm("vit.post_encoder", hidden, self.EPSILON)

    def embed_patches(self, image):
        """Patch embeddings ``[B, P, H]`` (row-major) of ``image`` ``[B, S, S, 3]``.

        The convolution is written as one matrix product over unfolded patches (kernel equals stride): on CPU that is the fastest form.
        """
        weight = self.patch_weight.reshape([self.patch_weight.shape[0], -1])
        return paddle.matmul(self._tiles(image), weight, transpose_y=True) + self.patch_bias

    def _tiles(self, image):
        """The pixels that each patch reads, channel by channel: ``[B, P, 3 * patch * patch]``."""
        size, patch = image.shape[1], self.patch
        grid, shift = size // patch, (patch - 1) // 2
        if image.stop_gradient and fused.applies(image):
            return fused.patch_tiles(image, patch, shift)
        # kernel = stride: with P - 1 - shift never read at the far side, a shifted crop of the padded image tiles exactly
        padded = F.pad(image, [shift, 0, shift, 0], data_format="NHWC")[:, : grid * patch, : grid * patch]
        tiles = padded.reshape([-1, grid, patch, grid, patch, 3]).transpose([0, 1, 3, 5, 2, 4])  # [B, g, g, 3, p, p]
        return tiles.reshape([-1, grid * grid, 3 * patch * patch])

    def forward(self, image):
        """States of ``image`` float32 ``[B, S, S, 3]``: ``[B, 1 + P, H]``, [CLS] first."""
        patches = self.embed_patches(image)
        cls = self.class_token.expand([length(patches), 1, patches.shape[2]])
        states = paddle.concat([cls, patches], axis=1)
        states = states + resize_position_embeddings(self.positions, image.shape[1] // self.patch)
        if self.hidden_dropout:
            states = F.dropout(states, self.hidden_dropout, training=self.training)
        return self.norm(self.encoder(states))
