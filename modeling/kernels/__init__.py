"""What a ViT consists of besides matrix products, and SDTPS's way through all patches, as Triton kernels with their
gradients.

`modeling.fused_vit` and `modeling.fused_sdtps` chain them, and say where that can be done. There they have to prove
themselves once, on random numbers, against the same as written.
"""
