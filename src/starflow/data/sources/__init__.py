"""Sources of captioned images: a folder of files, tar shards in WebDataset's layout, or parquet files."""
