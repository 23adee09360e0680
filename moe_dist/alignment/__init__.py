"""RoMA's neighbours: embeddings of questions and the nearest of them. Imports core and data."""
