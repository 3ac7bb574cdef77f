"""Hospital exports and open sets as examinations, a file for each kind of source."""
