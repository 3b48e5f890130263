"""RegionCLIP: a CLIP that matches texts with regions of a picture (Zhong et al., CVPR 2022, arXiv 2112.09106)."""
