"""RegionCLIP: a CLIP that matches texts with regions of an image (Zhong et al., CVPR 2022, arXiv 2112.09106)."""

from counting_zoo.models.region_clip.module import ClassifiedRegions, RegionCLIPCounter
from counting_zoo.models.region_clip.network import RegionOutput
from counting_zoo.models.region_clip.pretraining import RegionCLIPPretraining

__all__ = ["ClassifiedRegions", "RegionCLIPCounter", "RegionCLIPPretraining", "RegionOutput"]
