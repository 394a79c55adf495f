"""Adapters for `python -m kdcore.testing.golden`."""

from kd_diswot.functional import batch_similarity, channel_similarity


def metrics(inputs, params, options):
    relation = batch_similarity(inputs["feat_s"], inputs["feat_t"])
    semantic = channel_similarity(inputs["fcgrad_s"], inputs["fcgrad_t"])
    on_maps = channel_similarity(inputs["map_s"], inputs["map_t"])
    return {"relation_loss": relation.reshape(1), "semantic_loss": semantic, "channel_loss_map": on_maps,
            "score": -(relation + semantic), "loss": relation + semantic + on_maps}  # fmt: skip


ADAPTERS = {"metrics": metrics}
