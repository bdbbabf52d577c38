"What users of fastkd write. All else is imported from its module."
from fastkd.losses import BinarySoftTarget, ChannelWise, DecoupledKD, DIST, KDLoss, Logits, Mutual, NormalizedKD, SoftTarget
from fastkd.feature_losses import (ActivationBoundaries, Attention, ChannelWiseFeatures, Cosine, FeatureLoss, FitNet, NST, PKT, RKD, ReviewKD,
                                   Similarity, TrainedFeatureLoss, VID)
from fastkd.layers import get_model_layers
from fastkd.matching import layer_table, match_layers
from fastkd.similarity import layer_similarity
from fastkd.teacher import Teacher
from fastkd.online_teachers import EMATeacher, PeerTeacher
from fastkd.callback import KnowledgeDistillationCallback
from fastkd import metrics as _metrics  # `kd.teacher_metrics()`
from fastkd.plots import plot_losses, plot_similarity, plot_temperature, show_attention
