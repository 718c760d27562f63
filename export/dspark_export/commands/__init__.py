"""Commands of dspark-export that are more than a few lines, a file each."""
