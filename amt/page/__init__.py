"""The page of one or more runs, and the same figures as files.

charts      runs -> figures, as plain descriptions (drawing)
svg, files  the same descriptions as inline SVG, and as PNG and PDF
document    runs -> the page; markup escapes, pictures amplifies and encodes
"""
