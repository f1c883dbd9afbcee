"""What a plain request never enters. The core imports these modules where a request asks for them."""
